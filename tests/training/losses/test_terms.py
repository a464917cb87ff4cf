"""The terms of the objective: the KL, free bits and frequencies against other libraries, and their sum."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from random_pixels import pixels
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from latentcodec.training.losses import rate as rate_control
from latentcodec.training.losses import terms as losses
from latentcodec.training.losses.terms import LossConfig
from latentcodec.vae.posterior import mean_and_logvar, sample_posterior

# ---- the posterior and its divergence ----


def test_kl_equals_torch_distributions_and_diffusers() -> None:
    parameters = torch.randn(3, 8, 4, 5) * 3
    mean, logvar = mean_and_logvar(parameters)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(losses.kl_divergence(mean, logvar), expected)
    torch.testing.assert_close(
        losses.kl_divergence(mean, logvar), DiagonalGaussianDistribution(parameters).kl()
    )


def test_log_variance_is_clamped_as_diffusers_does() -> None:
    parameters = torch.tensor([0.0, 100.0, -100.0, 7.0]).view(1, 2, 2, 1).repeat(1, 2, 1, 1) * 1.0
    reference = DiagonalGaussianDistribution(parameters)
    mean, logvar = mean_and_logvar(parameters)
    assert torch.equal(mean, reference.mean)
    assert torch.equal(logvar, reference.logvar)


def test_a_draw_has_the_mean_and_std_of_the_posterior() -> None:
    mean, logvar = torch.full((1, 1, 300, 300), 2.0), torch.full((1, 1, 300, 300), math.log(0.25))
    z = sample_posterior(mean, logvar, torch.randn(mean.shape))
    assert z.mean().item() == pytest.approx(2, abs=0.01)
    assert z.std().item() == pytest.approx(0.5, abs=0.01)


def test_kl_per_channel_sums_to_the_kl_and_gives_bits_per_element() -> None:
    mean, logvar = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    per_channel = losses.kl_per_channel(mean, logvar)
    kl = losses.kl_divergence(mean, logvar).mean()
    torch.testing.assert_close(per_channel.sum() * 30, kl)
    assert rate_control.bits_per_element(per_channel) == pytest.approx(kl.item() / (4 * 30) / math.log(2))


def test_free_bits_floor_the_mean_of_each_channel_and_stop_its_gradient() -> None:
    mean = torch.zeros(2, 2, 4, 4)
    mean[:, 1] = 3.0  # 4.5 nats; channel 0 has none
    mean.requires_grad_()
    per_channel = losses.kl_per_channel(mean, torch.full_like(mean, -0.5))
    kl = losses.kl_with_free_bits(per_channel, per_channel.detach(), 16, free_bits=1.0)
    assert kl.item() == pytest.approx(16 * (math.log(2) + per_channel[1].item()))
    kl.backward()
    assert mean.grad[:, 0].abs().sum() == 0
    torch.testing.assert_close(mean.grad[:, 1], mean.detach()[:, 1] / 2)


def test_without_free_bits_the_kl_is_that_of_the_batch() -> None:
    mean, logvar = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    per_channel = losses.kl_per_channel(mean, logvar)
    kl = losses.kl_with_free_bits(per_channel, per_channel, 30, free_bits=0.0)
    torch.testing.assert_close(kl, losses.kl_divergence(mean, logvar).mean())


def test_free_bits_of_two_halves_of_a_batch_average_to_those_of_the_whole() -> None:
    mean, logvar = torch.randn(4, 6, 2, 2) * 2, torch.randn(4, 6, 2, 2)
    mean[:2, 0] = 0.01  # one half is below the floor, the whole is above it
    logvar[:2, 0] = 0.0
    reference = losses.kl_per_channel(mean, logvar)
    free_bits = 0.4 * reference[0].item() / math.log(2)
    assert losses.kl_per_channel(mean[:2], logvar[:2])[0] < free_bits * math.log(2) < reference[0]
    halves = [
        losses.kl_with_free_bits(losses.kl_per_channel(mean[i], logvar[i]), reference, 4, free_bits)
        for i in (slice(0, 2), slice(2, 4))
    ]
    whole = losses.kl_with_free_bits(reference, reference, 4, free_bits)
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole)


# ---- the objective ----


def test_the_objective_divides_nll_and_kl_alone_by_the_pixel_channels() -> None:
    terms = {
        "nll": torch.tensor([20.0, 40.0]),
        "kl": torch.tensor([10.0, 30.0]),
        "lpips": torch.tensor([1.0, 2.0]),
    }
    weights = {"nll": 1.0, "kl": 0.5, "lpips": torch.tensor(2.0)}
    assert losses.objective(terms, weights, 10).item() == pytest.approx(30 / 10 + 0.5 * 20 / 10 + 2 * 1.5)


def test_the_objective_wants_a_weight_for_every_loss() -> None:
    with pytest.raises(AssertionError, match="lpips"):
        losses.objective({"nll": torch.ones(1), "lpips": torch.ones(1)}, {"nll": 1.0}, 10)


def test_the_objective_does_not_depend_on_the_resolution() -> None:
    y, x = pixels(2, 3, 8, 8), pixels(2, 3, 8, 8)
    mean, logvar = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)

    def total(repeat: int) -> Tensor:
        tiled = [t.repeat(1, 1, repeat, repeat) for t in (y, x, mean, logvar)]
        terms = {"nll": losses.gaussian_nll(*tiled[:2], 0.0), "kl": losses.kl_divergence(*tiled[2:])}
        return losses.objective(terms, {"nll": 1.0, "kl": 0.1}, tiled[0][0].numel())

    torch.testing.assert_close(total(1), total(3))


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"target_bits": 2.0, "target_std": 0.1}, ["loss.target_bits", "loss.target_std"]),
        ({"learn_scale": True, "likelihood": "bernoulli"}, ["loss.learn_scale", "loss.likelihood"]),
    ],
)
def test_a_config_that_contradicts_itself_names_its_keys(values: dict, keys: list[str]) -> None:
    with pytest.raises(ValueError, match="loss") as raised:
        LossConfig(**values)
    assert all(key in str(raised.value) for key in keys)


# ---- high frequencies ----


def test_the_high_frequency_loss_ignores_a_smooth_error_and_sees_a_checkerboard() -> None:
    x = pixels(2, 3, 24, 24)
    checkerboard = (-1.0) ** (torch.arange(24)[:, None] + torch.arange(24)) * 0.1
    ramp = torch.linspace(-0.1, 0.1, 24).expand(24, 24)
    assert losses.high_frequency_loss(x + 0.3, x).max() < 1e-6
    assert losses.high_frequency_loss(x + ramp, x).max() < 1e-3
    torch.testing.assert_close(
        losses.high_frequency_loss(x + checkerboard, x), torch.tensor([0.1, 0.1]), rtol=0.01, atol=0
    )


def test_the_low_frequency_loss_sees_a_shifted_colour_and_ignores_a_checkerboard() -> None:
    x = pixels(2, 3, 40, 24)  # no multiple of the blocks
    checkerboard = (-1.0) ** (torch.arange(40)[:, None] + torch.arange(24)) * 0.1
    assert losses.low_frequency_loss(x + checkerboard, x).max() < 1e-6
    torch.testing.assert_close(losses.low_frequency_loss(x + 0.02, x), torch.tensor([0.02, 0.02]))


def test_the_blur_is_the_gaussian_of_torchvision() -> None:
    from torchvision.transforms.functional import gaussian_blur

    x = pixels(2, 3, 20, 17)
    inside = (..., slice(3, -3), slice(3, -3))  # the borders differ: repeated here, mirrored there
    torch.testing.assert_close(losses.gaussian_blur(x)[inside], gaussian_blur(x, 7, 1.0)[inside])
