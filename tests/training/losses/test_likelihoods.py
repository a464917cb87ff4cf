"""The likelihoods of pixels against torch.distributions, scipy and their own optima; bits per dimension."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from random_pixels import SHAPE, pixels
from scipy.stats import multivariate_t
from torch import Tensor, nn
from torch.distributions import Bernoulli, Laplace, Normal

from latentcodec.training.losses import terms as losses


def test_gaussian_and_laplace_equal_torch_distributions_summed_over_the_image() -> None:
    y, x, scale = pixels(*SHAPE), pixels(*SHAPE), 0.3
    for nll, distribution in ((losses.gaussian_nll, Normal), (losses.laplace_nll, Laplace)):
        expected = -distribution(y, scale).log_prob(x).sum((1, 2, 3))
        torch.testing.assert_close(nll(y, x, math.log(scale)), expected)


def test_student_t_equals_scipys_multivariate_t_of_each_image() -> None:
    y, x, scale = pixels(*SHAPE), pixels(*SHAPE), 0.3
    D = x[0].numel()
    expected = [
        -multivariate_t(image.flatten().numpy(), scale**2 * np.eye(D), df=D).logpdf(target.flatten().numpy())
        for image, target in zip(y, x, strict=True)
    ]
    torch.testing.assert_close(losses.student_t_nll(y, x, math.log(scale)), torch.tensor(expected).float())


def test_student_t_weighs_an_image_by_the_inverse_of_its_error() -> None:
    x, y = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.1)
    y[1] = 1.0
    y.requires_grad_()
    losses.student_t_nll(y, x, math.log(0.1)).sum().backward()
    gradient = y.grad[:, 0, 0, 0]
    # d/dy of D log(1 + mse / s^2), a pixel: 2 y / (s^2 + mse)
    torch.testing.assert_close(gradient, torch.tensor([0.2 / 0.02, 2 / 1.01]))


def test_bernoulli_equals_torch_distributions_for_pixels_as_probabilities() -> None:
    y, x = pixels(*SHAPE) * 0.9, pixels(*SHAPE)
    expected = -Bernoulli((y + 1) / 2, validate_args=False).log_prob((x + 1) / 2).sum((1, 2, 3))
    torch.testing.assert_close(losses.bernoulli_nll(y, x), expected)


def test_bernoulli_pulls_an_output_out_of_range_back_and_lets_none_run_away() -> None:
    y = torch.tensor([1.5, 1.5, -1.5, -1.5]).view(4, 1, 1, 1).requires_grad_()
    x = torch.tensor([0.0, 1.0, 0.0, -1.0]).view(4, 1, 1, 1)
    nll = losses.bernoulli_nll(y, x)
    nll.sum().backward()
    assert torch.isfinite(nll).all()
    back_down, at_top, back_up, at_bottom = y.grad.flatten().tolist()
    assert back_down > 1
    assert back_up < -1
    assert at_top == at_bottom == 0


def test_a_bernoulli_decoder_learns_all_256_levels_as_pixels() -> None:
    x = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    y = nn.Parameter(torch.zeros_like(x))
    optimizer = torch.optim.Adam([y], 0.01)
    for _ in range(1500):
        optimizer.zero_grad()
        losses.bernoulli_nll(y, x).sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.997
    levels = ((y.detach().clamp(-1, 1) + 1) * 127.5).round()
    assert torch.equal(levels.flatten(), torch.arange(256.0))


@pytest.mark.parametrize(
    ("nll", "optimum"),
    [
        (losses.gaussian_nll, lambda error: error.square().mean().sqrt()),
        (losses.laplace_nll, lambda error: error.abs().mean()),
        (
            lambda y, x, s: losses.student_t_nll(y[:1], x[:1], s),
            lambda error: error[:1].square().mean().sqrt(),
        ),
    ],
)
def test_a_learned_scale_converges_to_the_error_of_the_decoder(
    nll: Callable[[Tensor, Tensor, Tensor], Tensor], optimum: Callable[[Tensor], Tensor]
) -> None:
    y, x = pixels(*SHAPE), pixels(*SHAPE)
    log_scale = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([log_scale], 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (nll(y, x, log_scale).mean() / x[0].numel()).backward()
        optimizer.step()
    torch.testing.assert_close(log_scale.exp().detach(), optimum(x - y), rtol=1e-3, atol=0)


def test_bits_per_dimension_of_a_density_are_the_code_length_of_the_8_bit_levels() -> None:
    mean, scale = 0.1, 0.2
    normal = Normal(torch.tensor(mean, dtype=torch.float64), scale)
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    half = losses.PIXEL_STEP / 2
    probability = normal.cdf(levels + half) - normal.cdf(levels - half)
    code_length = -torch.log2(probability[100])
    nll = -normal.log_prob(levels[100])
    assert losses.bits_per_dimension(nll, 1, "gaussian").item() == pytest.approx(code_length.item(), abs=1e-3)
    assert losses.bits_per_dimension(torch.tensor(6 * math.log(2)), 3, "bernoulli").item() == pytest.approx(2)


def test_the_likelihood_named_in_the_config_is_the_one_computed() -> None:
    y, x = pixels(*SHAPE), pixels(*SHAPE)
    for name, expected in (
        ("gaussian", losses.gaussian_nll(y, x, 0.5)),
        ("student_t", losses.student_t_nll(y, x, 0.5)),
        ("laplace", losses.laplace_nll(y, x, 0.5)),
        ("bernoulli", losses.bernoulli_nll(y, x)),
    ):
        assert torch.equal(losses.negative_log_likelihood(name, y, x, 0.5), expected)
