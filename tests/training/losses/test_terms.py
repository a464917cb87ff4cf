"""The losses against torch.distributions, diffusers, autograd and torchmetrics; the rate control on a
codec."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from scipy.stats import multivariate_t
from torch import Tensor, nn
from torch.distributions import Bernoulli, Laplace, Normal, kl_divergence

from latentcodec.quality import perceptual
from latentcodec.quality.perceptual import Perceptual, load_lpips
from latentcodec.training.losses import rate as rate_control
from latentcodec.training.losses import terms as losses
from latentcodec.training.losses.terms import LossConfig
from latentcodec.vae.posterior import mean_and_logvar, sample_posterior

SHAPE = (3, 2, 6, 5)


def pixels(*shape: int) -> Tensor:
    """Images in [-1, 1]."""
    return torch.rand(*shape) * 2 - 1


@pytest.fixture(scope="session")
def squeeze_file() -> Path:
    """All weights of LPIPS-squeeze; a checkout without them skips what needs the trained network."""
    default = Path(__file__).parents[4] / "shared/weights/lpips_squeeze_v0.1.safetensors"
    path = Path(os.environ.get("LATENTCODEC_LPIPS_SQUEEZE", default))
    if not path.is_file():
        pytest.skip(f"no LPIPS weights at {path}; point LATENTCODEC_LPIPS_SQUEEZE at them")
    return path


# ---- likelihoods ----


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


# ---- the KL weight ----


def test_warm_up_is_a_line_from_zero_to_one() -> None:
    assert [rate_control.kl_warmup(step, 4) for step in (0, 1, 2, 4, 9)] == [0, 0.25, 0.5, 1, 1]
    assert rate_control.kl_warmup(0, 0) == 1


def test_relative_std_is_that_of_the_noise_in_the_samples() -> None:
    mean = torch.randn(40, 2, 16, 16) * torch.tensor([2.0, 0.5]).view(1, 2, 1, 1) + 3
    logvar = torch.tensor([0.5, 0.2]).view(1, 2, 1, 1).square().log().expand_as(mean)
    z = sample_posterior(mean, logvar, torch.randn(mean.shape))
    measured = math.exp((torch.tensor([0.5, 0.2]) / z.std((0, 2, 3))).log().mean())
    assert rate_control.relative_std(rate_control.channel_statistics(mean, logvar)) == pytest.approx(
        measured, rel=0.01
    )


def test_channel_statistics_of_two_processes_average_to_those_of_one() -> None:
    mean, logvar = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    halves = [rate_control.channel_statistics(mean[i], logvar[i]) for i in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, rate_control.channel_statistics(mean, logvar))


def test_an_unused_latent_has_relative_std_one_and_no_bits() -> None:
    std = rate_control.relative_std(
        rate_control.channel_statistics(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    )
    assert std == 1
    assert rate_control.bits_of_std(std) == 0


def test_the_kl_weight_moves_by_the_stated_gain_and_stays_in_its_range() -> None:
    assert rate_control.next_kl_weight(1.0, 3.5, 3.0) == pytest.approx(2 ** (rate_control.CONTROL_GAIN * 0.5))
    assert rate_control.next_kl_weight(1.0, 3.0, 3.0) == 1
    assert rate_control.next_kl_weight(1.0, 0.0, 9.0) == pytest.approx(2**-rate_control.CONTROL_GAIN)
    low, high = rate_control.KL_WEIGHT_RANGE
    assert rate_control.next_kl_weight(low, 0.0, 5.0) == low
    assert rate_control.next_kl_weight(high, 5.0, 0.0) == high


@pytest.mark.slow
@pytest.mark.parametrize(("start", "key"), [(1e-3, "bits"), (10.0, "bits"), (10.0, "std")])
def test_rate_control_reaches_its_target_from_below_and_above(start: float, key: str) -> None:
    """A linear codec of gaussian data, whose optimum is known, trained by Adam while the weight is
    steered."""
    x = torch.randn(16, 2, 4, 4) * torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
    encoder, decoder = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 2, 1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 0.03)
    weight, rates = start, []
    for _ in range(600):
        mean, logvar = mean_and_logvar(encoder(x))
        y = decoder(sample_posterior(mean, logvar, torch.randn_like(mean)))
        terms = {"nll": losses.gaussian_nll(y, x, -2.0), "kl": losses.kl_divergence(mean, logvar)}
        optimizer.zero_grad()
        losses.objective(terms, {"nll": 1.0, "kl": weight}, 32).backward()
        optimizer.step()
        if key == "bits":
            rate = rate_control.bits_per_element(losses.kl_per_channel(mean, logvar))
        else:
            rate = rate_control.bits_of_std(
                rate_control.relative_std(rate_control.channel_statistics(mean, logvar))
            )
        weight = rate_control.next_kl_weight(weight, rate, 2.0)
        rates.append(rate)
    assert sum(rates[-100:]) / 100 == pytest.approx(2.0, abs=0.1)


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


# ---- LPIPS ----


def test_lpips_of_a_local_file_equals_torchmetrics_documented_example(squeeze_file: Path) -> None:
    distance = Perceptual("squeeze", squeeze_file)
    torch.manual_seed(123)
    x, y = pixels(10, 3, 100, 100), pixels(10, 3, 100, 100)
    assert distance(y, x).mean().item() == pytest.approx(0.1008, abs=5e-5)


def test_lpips_gradient_equals_the_numeric_difference_and_lowers_the_distance(squeeze_file: Path) -> None:
    distance = Perceptual("squeeze", squeeze_file).double()
    x, y = pixels(1, 3, 32, 32).double(), pixels(1, 3, 32, 32).double().requires_grad_()
    (gradient,) = torch.autograd.grad(distance(y, x).sum(), y)
    direction, step = torch.randn_like(y), 1e-6
    with torch.no_grad():
        numeric = (distance(y + step * direction, x) - distance(y - step * direction, x)) / (2 * step)
        lower = distance(y - 0.01 * gradient / gradient.abs().max(), x)
    assert numeric.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)
    assert lower < distance(y, x)
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())


def test_lpips_of_other_channels_is_the_mean_over_grey_images(squeeze_file: Path) -> None:
    distance = Perceptual("squeeze", squeeze_file)
    x, y = pixels(2, 4, 32, 32), pixels(2, 4, 32, 32)
    channels = [distance.network(y[:, [i] * 3], x[:, [i] * 3]).flatten() for i in range(4)]
    torch.testing.assert_close(distance(y, x), torch.stack(channels).mean(0))
    torch.testing.assert_close(distance(y[:, :1], x[:, :1]), channels[0])


def test_lpips_stays_deterministic_in_training_mode_and_draws_no_random_numbers(squeeze_file: Path) -> None:
    before = torch.get_rng_state()
    distance = Perceptual("squeeze", squeeze_file).train()
    assert torch.equal(torch.get_rng_state(), before)
    x, y = pixels(2, 3, 32, 32), pixels(2, 3, 32, 32)
    assert torch.equal(distance(y, x), distance(y, x))


def test_a_missing_network_names_both_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no cached network either
    for net in ("vgg", "alex", "squeeze"):
        with pytest.raises(ValueError, match=r"lpips_net.*no route.*lpips_weights"):
            load_lpips(net)
    with pytest.raises(ValueError, match="lpips_net: 'resnet'"):
        load_lpips("resnet")


def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = perceptual._new_network("squeeze", download=False)
    own = {perceptual._stored_name(k): v for k, v in network.state_dict().items() if perceptual._is_weight(k)}
    path = tmp_path / "lpips.safetensors"
    with pytest.raises(ValueError, match=r"lpips_weights.*cannot be read"):
        load_lpips("squeeze", path)
    save_file({k: v.half() for k, v in own.items()}, path)
    assert len(load_file(path)) == 7 + 2 * (1 + 8 * 3)
    torch.testing.assert_close(
        load_lpips("squeeze", path).lin3.model[1].weight, own["lin3.weight"], atol=1e-3, rtol=1e-3
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (path, "~/lpips.safetensors"):
        with pytest.raises(ValueError, match=r"lpips_weights.*lpips_net 'alex'.*names differ"):
            load_lpips("alex", name)
    save_file({**own, "lin0.weight": torch.zeros(1, 3, 1, 1)}, path)
    with pytest.raises(ValueError, match=r"'lin0.weight' has the shape \[1, 3, 1, 1\]"):
        load_lpips("squeeze", path)
