"""What judges a micro-batch: each loss by name and weight against its formula by hand, and what is reported."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_objectives import F_DOWN, C, halving, images, never, new_objective, new_pass
from small_runs import small
from torch.nn import functional as F

from latentcodec.quality import perceptual
from latentcodec.training.losses.regularizers import RegularizerConfig, downscale_pair, draw_downscale
from latentcodec.training.losses.terms import LossConfig, kl_divergence, kl_per_channel
from latentcodec.training.start.model import TrainedCodec, new_vae


def test_what_is_off_is_neither_computed_nor_reported():
    objective, x = new_objective(), images()
    inputs = objective.inputs(x, torch.arange(3), 0, never)
    losses, weights = objective.losses(new_pass(x), inputs, 0, 0, never, never)
    assert list(losses) == list(weights) == ["nll", "kl"]


def test_every_loss_arrives_by_name_with_the_weight_of_its_key():
    loss = LossConfig(kl_weight=0.5, high_frequency_weight=2.0, low_frequency_weight=7.0)
    regularizer = RegularizerConfig(
        spectrum_weight=3.0,
        variance_expansion_weight=4.0,
        latent_tail_weight=5.0,
        scale_equivariance_weight=6.0,
        round_trip_weight=8.0,
    )
    objective, x = new_objective(loss, regularizer), images()
    result = new_pass(x)
    up, down = torch.nn.Upsample(scale_factor=F_DOWN), torch.nn.AvgPool2d(F_DOWN)
    inputs = objective.inputs(x, torch.arange(3), 0, never)
    losses, weights = objective.losses(
        result, inputs, 0, 0, lambda z: up(z[:, :3]), lambda y: down(y)[:, [0, 1, 2, 0]]
    )
    expected = {"nll": 1.0, "kl": 0.5, "high_frequency": 2.0, "spectrum": 3.0, "variance_expansion": 4.0}
    assert weights == expected | {
        "latent_tail": 5.0,
        "scale_equivariance": 6.0,
        "low_frequency": 7.0,
        "round_trip": 8.0,
    }
    assert losses.keys() == weights.keys()
    for name, value in losses.items():
        assert value.shape in ((3,), ()), name
        assert value.requires_grad or name in ("latent_tail", "spectrum"), name


def test_scale_equivariance_is_the_likelihood_of_the_small_pair_per_pixel_channel():
    objective = new_objective(regularizer=RegularizerConfig(scale_equivariance_weight=1.0))
    x = images()
    result = new_pass(x)
    inputs = objective.inputs(x, torch.arange(3), 0, never)
    losses, _ = objective.losses(
        result, inputs, 0, 7, lambda z: F.interpolate(z[:, :3], scale_factor=F_DOWN), never
    )
    small_x, small_z = downscale_pair(x, result.latent, draw_downscale(0, 7))
    y = F.interpolate(small_z[:, :3], scale_factor=F_DOWN)
    normal = torch.distributions.Normal(y, 0.2)
    expected = -normal.log_prob(small_x).flatten(1).mean(1)
    torch.testing.assert_close(losses["scale_equivariance"], expected)


def test_scale_equivariance_asks_for_the_picture_after_the_first_round_trip():
    config = RegularizerConfig(generations_share=1.0, generations=3, scale_equivariance_weight=1.0)
    objective, x = new_objective(regularizer=config), images()
    inputs, result = objective.inputs(x, torch.arange(3), 0, halving([])), new_pass(x)
    losses, _ = objective.losses(
        result, inputs, 0, 7, lambda z: F.interpolate(z[:, :3], scale_factor=F_DOWN), never
    )
    small_x, small_z = downscale_pair(inputs.image, result.latent, draw_downscale(0, 7))
    normal = torch.distributions.Normal(F.interpolate(small_z[:, :3], scale_factor=F_DOWN), 0.2)
    torch.testing.assert_close(losses["scale_equivariance"], -normal.log_prob(small_x).flatten(1).mean(1))


def test_a_round_trip_is_compared_with_the_latent_that_was_decoded_before_its_noise():
    """Also where the step has warped it: then the reconstruction has another size than the image."""
    regularizer = RegularizerConfig(
        round_trip_weight=1.0, equivariance_probability=1.0, latent_noise_share=1.0, additive_noise=0.5
    )
    objective, x = new_objective(regularizer=regularizer), images()
    result, inputs = new_pass(x), objective.inputs(x, torch.arange(3), 0, never)
    (warp,) = inputs.transforms
    shape = warp(result.mean).shape
    assert shape != result.mean.shape
    result = result._replace(reconstruction=inputs.target)
    losses, _ = objective.losses(result, inputs, 0, 0, never, lambda y: warp(result.mean) + 2)
    torch.testing.assert_close(losses["round_trip"], torch.full((3,), 4.0))


def test_a_round_trip_is_not_made_shorter_by_smaller_latents():
    """Latents and their distance k times as large: the loss must not change with k."""
    objective, x = new_objective(regularizer=RegularizerConfig(round_trip_weight=1.0)), images(side=128)
    inputs, result = objective.inputs(x, torch.arange(3), 0, never), new_pass(x)
    z, one = torch.randn(3, C, 32, 32), torch.ones(())

    def loss(k):
        grown = result._replace(mean=k * z)
        return objective.losses(grown, inputs, 0, 0, never, lambda y: k * (z + 2))[0]["round_trip"]

    value, slope = torch.autograd.functional.jvp(loss, one, one)
    torch.testing.assert_close(value, torch.full((3,), 4.0))
    assert slope.abs().max() < 0.5  # without the unit's growth it is 8


def test_measures_are_means_without_gradient():
    objective, x = new_objective(LossConfig(learn_scale=True)), images()
    result = new_pass(x)
    measured = objective.measures(result, torch.tensor(1000.0), x)
    assert not any(value.requires_grad for value in measured.values())
    torch.testing.assert_close(measured["mse"], (result.reconstruction - x).square().mean().detach())
    torch.testing.assert_close(measured["scale"], torch.tensor(0.2))
    kl = kl_divergence(result.mean, result.logvar).mean().item()  # the code length of the latent counts too
    bits = (1000 + kl) / (3 * 32 * 32) / math.log(2) + math.log2(127.5)
    assert measured["bits_per_dimension"].item() == pytest.approx(bits)
    expected = kl_per_channel(result.mean, result.logvar)
    torch.testing.assert_close(
        torch.stack([measured[f"channel_kl/{i}"] for i in range(C)]), expected.detach()
    )


def test_channel_statistics_are_taken_out_of_the_report_and_become_three_numbers():
    objective, x = new_objective(LossConfig(kl_weight=0.25)), images()
    result = new_pass(x)
    report = {k: v.item() for k, v in objective.measures(result, torch.tensor(1.0), x).items()}
    said = objective.after_step(0, report)
    assert not [name for name in report if "/" in name]
    nats = torch.distributions.kl_divergence(
        torch.distributions.Normal(result.mean, (result.logvar / 2).exp()), torch.distributions.Normal(0, 1)
    )
    assert said["kl_weight"] == 0.25
    assert said["latent_bits"] == pytest.approx(nats.mean().item() / math.log(2), rel=1e-5)
    noise, signal = result.logvar.exp().mean((0, 2, 3)), result.mean.var((0, 2, 3), correction=0)
    expected = (noise / (noise + signal)).sqrt().log().mean().exp().item()
    assert said["latent_noise"] == pytest.approx(expected, rel=1e-5)


def test_free_bits_follow_the_statistics_of_the_step_before():
    objective, x = new_objective(LossConfig(free_bits=1.0)), images()
    result, inputs = new_pass(x), objective.inputs(x, torch.arange(3), 0, never)
    cells, floor = 8 * 8, math.log(2)
    channels = kl_per_channel(result.mean, result.logvar)
    objective.rate.reference = torch.tensor([0.0, 9.0, 0.0, 9.0])
    kl = objective.losses(result, inputs, 0, 0, never, never)[0]["kl"]
    torch.testing.assert_close(kl, cells * (2 * floor + channels[1] + channels[3]))


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """LPIPS' smallest network with random weights: nobody has to download any to see where gradients go."""
    network = perceptual._new_network("squeeze", download=False)
    weights = {
        perceptual._stored_name(name): value.abs().contiguous() if name.startswith("lin") else value
        for name, value in network.state_dict().items()
        if perceptual._is_weight(name)
    }
    path = tmp_path_factory.mktemp("lpips") / "squeeze.safetensors"
    save_file(weights, path)
    return path


def test_lpips_has_a_gradient_that_reaches_every_weight_of_the_codec(lpips_file):
    weights = lpips_file
    objective = new_objective(LossConfig(lpips_weight=1.0, lpips_net="squeeze", lpips_weights=str(weights)))
    codec = TrainedCodec(new_vae(small(Path("unused"), Path("unused")).model, None, None, list), 1.0, False)
    inputs = objective.inputs(images(2), torch.arange(2), 0, never)
    result = codec(inputs.x, inputs.noise, inputs.transform)
    losses, table = objective.losses(result, inputs, 0, 0, never, never)
    assert table["lpips"] == 1.0
    losses["lpips"].mean().backward()
    for name, parameter in codec.vae.named_parameters():
        if (
            "conv2" not in name and "conv_shortcut" not in name
        ):  # residual branches start at zero, and hide the rest
            continue
        assert parameter.grad is not None, name
    assert all(p.grad.abs().sum() > 0 for p in codec.vae.decoder.conv_out.parameters())
    assert all(p.grad.abs().sum() > 0 for p in codec.vae.encoder.conv_in.parameters())
    assert all(p.grad is None for p in objective.lpips.parameters())
