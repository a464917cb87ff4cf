"""Measures of codes of one cell, against torch's distributions and a model whose likelihood is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from latentcodec.quality import one_cell as cells
from latentcodec.quality.basics import gradients, likelihood, numbers_of_a_gaussian


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_kl_of_each_number_is_that_of_torch():
    mean, std = normal(50, 3), 0.1 + normal(50, 3, seed=1).abs()
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(cells.kl_by_number(mean, std), expected)


def test_the_measures_of_ideal_codes():
    """A posterior that is N(0, I) on the whole: half of the variance in the means."""
    mean, std = normal(20000, 2) * math.sqrt(0.5), torch.full((20000, 2), math.sqrt(0.5))
    x = torch.zeros(20000, 1, 4, 4)
    x[::2] = 1
    found = cells.measure(x, mean, std, x, x)
    assert found["within"] == pytest.approx([0.683, 0.954, 0.997], abs=0.01)
    assert found["draws_std"] == pytest.approx([1, 1], abs=0.02)
    assert found["draws_correlation"] < 0.02
    assert (found["active"], found["decoder_spread"], found["squared_error"]) == (2, pytest.approx(1), 0)
    assert found["kl_nats"] == pytest.approx(2 * 0.5 * math.log(2), abs=0.02)


class LinearModel:
    """x = W z + noise of deviation s, with its exact posterior, as `RawCodec` has it; W has orthogonal columns."""

    def __init__(self, scale):
        self.weight, self.scale = torch.diag(torch.tensor([2.0, 1.0, 0.5])), scale

    def posterior(self, x):
        strength = self.weight.diagonal().square() / self.scale**2
        mean = x.flatten(1) * self.weight.diagonal() / self.scale**2 / (1 + strength)
        return mean, (1 / (1 + strength)).sqrt().expand_as(mean)

    def decode(self, z):
        return (z @ self.weight)[:, None, None]

    def log_likelihood(self, x):
        covariance = self.weight @ self.weight.T + self.scale**2 * torch.eye(3)
        return MultivariateNormal(torch.zeros(3), covariance).log_prob(x.flatten(1)).mean().item()


def test_the_bound_is_the_likelihood_where_the_posterior_is_exact():
    model, x = LinearModel(0.7), normal(40, 1, 1, 3)
    bounds = cells.importance_bounds(model, x, (1, 10), 0.7)
    assert list(bounds.values()) == pytest.approx([model.log_likelihood(x)] * 2, abs=1e-4)


def test_more_draws_come_nearer_from_below_where_it_is_not():
    model, x = LinearModel(0.7), normal(40, 1, 1, 3)
    exact = model.posterior
    model.posterior = lambda x: (exact(x)[0] + 0.3, exact(x)[1] * 0.7)
    bounds = cells.importance_bounds(model, x, (1, 10, 100), 0.7)
    assert bounds[1] < bounds[10] < bounds[100] < model.log_likelihood(x) + 0.05


def test_sharpness_tells_blurred_images_from_sharp_ones():
    x = normal(8, 1, 32, 32)
    assert cells.sharpness(x, x) == pytest.approx(1)
    blurred = F.avg_pool2d(F.pad(x, [1] * 4, mode="circular"), 3, 1)
    assert cells.sharpness(blurred, x) < 0.2


def test_neighbours_labels_draws_and_steps():
    labels = torch.arange(60) % 3
    codes = labels[:, None] * 10.0 + normal(60, 2) * 0.1
    assert cells.label_agreement(codes, labels) == 1
    assert cells.label_agreement(normal(60, 2), labels) < 0.6
    assert cells.trained_share(codes, torch.full((60, 2), 0.1), codes + 0.01) == 1
    assert cells.trained_share(codes, torch.full((60, 2), 0.1), codes + 5) == 0
    data = normal(50, 1, 4, 4)
    assert cells.precision(data[:10] + 0.01, data) == 1
    assert cells.precision(data[:10] + 9, data) == 0
    assert cells.image_distance(data[:3], data).max() == pytest.approx(0, abs=1e-2)
    even = torch.arange(5.0)[:, None, None, None].expand(5, 1, 2, 2)
    assert cells.largest_step(even) == pytest.approx(1)
    assert cells.largest_step(torch.cat([even, even[-1:] + 9])) > 2
    classes = cells.class_means(codes, torch.full((60, 2), 0.1), labels)
    assert [round(mean[0]) for mean in classes["means"]] == [0, 10, 20]


def test_what_needs_no_training():
    found = gradients()
    assert found["sample"] is None
    assert found["mean + sigma * noise"] == pytest.approx(1, abs=0.05)
    assert likelihood()["largest_difference"] < 1e-5
    assert numbers_of_a_gaussian()["2"] == {"diagonal": 4, "whole": 5}


def test_a_walk_that_turns_is_not_monotone():
    assert cells.monotone({1.0: 1, 10.0: 2, 0.1: 0}, rising=True)
    assert not cells.monotone({1.0: 1, 10.0: 2, 0.1: 3}, rising=True)
    assert cells.monotone({1.0: 2, 10.0: 1.9, 0.1: 1.95}, rising=True, tolerance=0.2)
