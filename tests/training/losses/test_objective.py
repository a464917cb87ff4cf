"""What a micro-batch goes through and what judges it, against the formulas applied by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_runs import everything, small
from torch.nn import functional as F

from latentcodec.quality import perceptual
from latentcodec.training.losses.objective import Objective
from latentcodec.training.losses.rate import RateControl
from latentcodec.training.losses.regularizers import (
    RegularizerConfig,
    downscale_pair,
    draw_downscale,
    draw_noise_levels,
)
from latentcodec.training.losses.sample import ForwardPass
from latentcodec.training.losses.spectra import mask_spectrum
from latentcodec.training.losses.terms import LossConfig, kl_divergence, kl_per_channel
from latentcodec.training.preflight import smallest_crop
from latentcodec.training.start.model import TrainedCodec, new_vae

C, F_DOWN = 4, 4  # latent channels and downsampling factor of the small model
SEED = 0


def new_objective(loss=None, regularizer=None, whole=F_DOWN) -> Objective:
    settings = loss or LossConfig(), regularizer or RegularizerConfig()
    return Objective(*settings, SEED, C, F_DOWN, whole, torch.device("cpu"))


def images(count=3, side=32):
    return torch.rand(count, 3, side, side) * 2 - 1


def new_pass(x) -> ForwardPass:
    cells = (len(x), C, x.shape[2] // F_DOWN, x.shape[3] // F_DOWN)
    mean, logvar = torch.randn(cells), torch.randn(cells) - 1
    y = (x + 0.1 * torch.randn_like(x)).requires_grad_()
    return ForwardPass(
        mean.requires_grad_(), logvar.requires_grad_(), mean + 0.1, y, torch.tensor(math.log(0.2))
    )


def never(z):
    raise AssertionError("encoded or decoded a second time")


def test_noise_belongs_to_the_position_and_not_to_the_batch():
    share = RegularizerConfig(latent_noise_share=1.0, interpolative_noise=0.5, additive_noise=0.5)
    objective, x, z = new_objective(regularizer=share), images(), torch.randn(3, C, 8, 8)
    whole = objective.inputs(x, torch.tensor([5, 6, 7]), draw=0, recode=never)
    parts = [objective.inputs(x[i : i + 1], torch.tensor([5 + i]), draw=9, recode=never) for i in range(3)]
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
    assert torch.equal(
        whole.transform(z), torch.cat([p.transform(z[i : i + 1]) for i, p in enumerate(parts)])
    )
    assert not torch.equal(
        whole.noise, objective.inputs(x, torch.tensor([8, 9, 10]), draw=0, recode=never).noise
    )
    assert abs(whole.noise.std() - 1) < 0.1
    added = whole.transform(torch.zeros_like(z))  # by the latent noise, which is another one
    assert abs(torch.corrcoef(torch.stack([added.flatten(), whole.noise.flatten()]))[0, 1]) < 0.2


def test_replaced_and_added_noise_are_two_draws_each_with_its_own_level():
    """Large samples show both levels: z of constant 1 keeps the share (1 - level), and what is added varies."""
    config = RegularizerConfig(
        latent_noise_share=1.0, interpolative_noise=0.5, interpolative_noise_std=0.0, additive_noise=8.0
    )
    positions, z = torch.arange(4), torch.ones(4, C, 64, 64)
    replaced, added = draw_noise_levels(config, SEED, positions)
    transformed = (
        new_objective(regularizer=config).inputs(images(4), positions, draw=0, recode=never).transform(z)
    )
    torch.testing.assert_close(transformed.mean((1, 2, 3)), 1 - replaced, atol=0.3, rtol=0)
    torch.testing.assert_close(transformed.std((1, 2, 3)), added, atol=0.2, rtol=0.05)
    both = new_objective(regularizer=replace(config, interpolative_noise_std=4.0)).inputs(
        images(4), positions, draw=0, recode=never
    )
    # Two independent draws add in squares; one draw used twice would add its deviations.
    expected = ((4 * replaced).square() + added.square()).sqrt()
    torch.testing.assert_close(both.transform(z).std((1, 2, 3)), expected, atol=0.2, rtol=0.05)


def test_without_regularizers_the_decoder_gets_the_latent_and_the_target_is_the_image():
    inputs = new_objective().inputs(x := images(), torch.arange(3), draw=0, recode=never)
    assert inputs.x is x
    assert inputs.target is x
    assert inputs.transforms == []
    assert inputs.transform(z := torch.randn(3, C, 8, 8)) is z


def test_equivariance_warps_latent_and_target_alike_and_lets_the_encoder_see_the_image():
    objective = new_objective(regularizer=RegularizerConfig(equivariance_probability=1.0))
    x = F.interpolate(images(side=4), size=32, mode="bicubic")  # smooth, so that little depends on the filter
    for draw in range(6):
        inputs = objective.inputs(x, torch.arange(3), draw, never)
        assert inputs.x is x
        z = F.avg_pool2d(x, F_DOWN)  # a latent that is a small image must be warped as the image is
        warped, target = inputs.transform(z), F.avg_pool2d(inputs.target, F_DOWN)
        assert warped.shape == target.shape
        assert (warped - target).abs().mean() < 0.5 * (torch.roll(warped, 1, 0) - target).abs().mean()


def test_low_resolution_steps_show_the_encoder_a_smaller_image():
    objective = new_objective(regularizer=RegularizerConfig(low_resolution_probability=1.0))
    inputs = objective.inputs(images(), torch.arange(3), draw=0, recode=never)
    assert inputs.x.shape[-1] < 32
    assert inputs.target is inputs.x
    assert inputs.noise.shape[-2:] == (inputs.x.shape[-2] // F_DOWN, inputs.x.shape[-1] // F_DOWN)


def test_smaller_images_have_whole_latent_cells_where_raw_ones_are_packed():
    """As in FLUX.2, whose teacher compares packed latents: three packed cells shrink to one, two or three."""
    objective = new_objective(regularizer=RegularizerConfig(low_resolution_probability=1.0), whole=2 * F_DOWN)
    x = images(1, side=6 * F_DOWN)
    shapes = {objective.inputs(x, torch.arange(1), draw, never).x.shape[-2:] for draw in range(40)}
    assert shapes == {(side * 2 * F_DOWN,) * 2 for side in (1, 2, 3)}


def test_spectrum_masking_masks_latent_and_target():
    objective = new_objective(regularizer=RegularizerConfig(spectrum_masking=True))
    x, z = images(side=64), torch.randn(3, C, 16, 16)
    seen = set()
    for draw in range(8):
        inputs = objective.inputs(x, torch.arange(3), draw, never)
        fitting = [n for n in (0, 8, 10, 12) if torch.equal(inputs.target, mask_spectrum(x, n))]
        assert any(torch.equal(inputs.transform(z), mask_spectrum(z, n)) for n in fitting)
        seen |= {*fitting}
    assert len(seen) > 1


def halving(seen):
    """A codec that halves what it is given, and notes of which size that was."""

    def recode(y):
        seen.append(y.shape[-1])
        return 0.5 * y

    return recode


def test_round_trips_are_made_of_small_pictures_where_the_step_makes_them_small():
    config = RegularizerConfig(generations_share=1.0, generations=3, low_resolution_probability=1.0)
    inputs = new_objective(regularizer=config).inputs(x := images(), torch.arange(3), 0, halving(seen := []))
    alone = RegularizerConfig(low_resolution_probability=1.0)
    plain = new_objective(regularizer=alone).inputs(x, torch.arange(3), 0, never)
    assert inputs.x.shape == plain.x.shape != x.shape
    assert set(seen) == {plain.x.shape[-1]}
    torch.testing.assert_close(inputs.target, 0.5 * plain.x, atol=0.5 / 127.5, rtol=0)
    assert (inputs.x.abs().mean((1, 2, 3)) < 0.6 * inputs.target.abs().mean((1, 2, 3))).any()


def test_the_picture_after_the_first_round_trip_is_warped_to_be_the_target():
    config = RegularizerConfig(generations_share=1.0, generations=3, equivariance_probability=1.0)
    inputs = new_objective(regularizer=config).inputs(x := images(), torch.arange(3), 0, halving([]))
    torch.testing.assert_close(inputs.image, 0.5 * x, atol=0.5 / 127.5, rtol=0)
    assert inputs.target.shape != inputs.x.shape == x.shape
    assert torch.equal(inputs.target, inputs.transforms[0](inputs.image))


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


@pytest.mark.parametrize("interpolative", [0.0, 1.0])
def test_noise_in_training_grows_with_the_latents(interpolative):
    """The noise that k z gets has the derivative k: latents escape it by no size."""
    config = RegularizerConfig(latent_noise_share=1.0, additive_noise=0.5, interpolative_noise=interpolative)
    objective = new_objective(regularizer=config)
    objective.rate.deviation = torch.full((C,), 3.0)
    inputs = objective.inputs(images(side=128), torch.arange(3), 0, never)
    z, one = 3 * torch.randn(3, C, 32, 32), torch.ones(())
    value, slope = torch.autograd.functional.jvp(lambda k: inputs.transform(k * z), one, one)
    replaced, added = draw_noise_levels(config, SEED, torch.arange(3))
    kept = (1 - replaced).view(-1, 1, 1, 1) * z
    grown = (slope - kept).std((1, 2, 3))  # what of the slope is noise: level times unit
    torch.testing.assert_close(grown, 3 * added, atol=0, rtol=0.1)
    if not interpolative:
        torch.testing.assert_close((value - kept).std((1, 2, 3)), 3 * added, atol=0, rtol=0.1)


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


def test_the_kl_weight_warms_up_and_then_leads_the_rate_to_its_target():
    rate = RateControl(LossConfig(kl_weight=1e-3, kl_warmup_steps=10, target_bits=2.0), C)
    assert [rate.at(step) for step in (0, 5, 10)] == pytest.approx([0, 5e-4, 1e-3])
    bits = 6.0
    for step in range(400):
        said = rate.update(step, torch.full((C,), bits * math.log(2)), torch.ones(3, C))
        if step < 10:
            assert rate.weight == 1e-3
        bits = 2.5 - math.log2(max(rate.at(step + 1), 1e-9) / 1e-3) / 2  # a codec that follows at once
    assert said["latent_bits"] == pytest.approx(2.0, abs=0.01)
    assert rate.weight == pytest.approx(2e-3, rel=0.02)


def test_a_target_deviation_is_led_to_as_well():
    rate = RateControl(LossConfig(kl_weight=1e-3, target_std=0.25), C)
    for step in range(400):
        std = min(1.0, 0.5 * (rate.weight / 1e-3) ** 0.5)
        statistics = torch.stack([torch.zeros(C), torch.full((C,), 1 - std**2), torch.full((C,), std**2)])
        said = rate.update(step, torch.ones(C), statistics)
    assert said["latent_noise"] == pytest.approx(0.25, rel=0.01)


def test_rate_control_survives_a_checkpoint_to_the_bit():
    config = LossConfig(kl_weight=1e-3, target_bits=2.0)
    rate = RateControl(config, C)
    rate.update(3, torch.rand(C), torch.rand(3, C))
    other = RateControl(config, C)
    other.load_state_dict(json.loads(json.dumps(rate.state_dict())))
    assert other.weight == rate.weight
    assert torch.equal(other.reference, rate.reference)


def test_a_weight_that_no_target_steers_is_that_of_the_configuration_after_a_resume():
    rate = RateControl(LossConfig(kl_weight=1e-3), C)
    other = RateControl(LossConfig(kl_weight=1e-5), C)
    other.load_state_dict(rate.state_dict())
    assert other.weight == 1e-5


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


def test_the_smallest_crop_is_what_training_really_decodes():
    config = everything(small(Path("unused"), Path("unused")))
    objective = new_objective(config.loss, config.regularizer)
    sides = [
        objective.inputs(images(1), torch.arange(1), draw, lambda y: y).target.shape[-1]
        for draw in range(200)
    ]
    assert min(sides) == smallest_crop(config, F_DOWN) == 8
    assert smallest_crop(replace(config, regularizer=RegularizerConfig()), F_DOWN) == 32
    buckets = replace(config.data, resolution=96, buckets=True)
    assert smallest_crop(replace(config, data=buckets, regularizer=RegularizerConfig()), F_DOWN) == 64
    with pytest.raises(ValueError, match=r"data\.resolution 96 gives crops of 96 pixels.*factor 64"):
        smallest_crop(replace(config, data=buckets), 64)


def test_latents_of_one_cell_have_no_spectrum_to_match():
    config = small(Path("unused"), Path("unused"))
    config = replace(config, regularizer=RegularizerConfig(spectrum_weight=1.0))
    assert smallest_crop(config, 16) == 32
    with pytest.raises(ValueError, match=r"spectrum_weight: data\.resolution 32 gives latents of one cell"):
        smallest_crop(config, 32)
    shrunk = replace(
        config, regularizer=RegularizerConfig(spectrum_weight=1.0, low_resolution_probability=0.5)
    )
    with pytest.raises(ValueError, match="latents of one cell"):
        smallest_crop(shrunk, 16)


@pytest.mark.parametrize(
    ("resolution", "f", "low", "buckets", "cells"),
    [
        (64, 8, 0.0, False, None),
        (96, 8, 0.0, False, 12),
        (64, 4, 0.5, False, 4),
        (256, 4, 0.5, False, None),
        (128, 4, 0.0, True, None),
        (128, 8, 0.0, True, 12),
    ],
)
def test_crops_whose_spectra_cannot_be_masked_are_refused_at_the_start(resolution, f, low, buckets, cells):
    config = small(Path("unused"), Path("unused"))
    config = replace(
        config,
        data=replace(config.data, resolution=resolution, buckets=buckets),
        regularizer=RegularizerConfig(spectrum_masking=True, low_resolution_probability=low),
    )
    if cells is None:
        smallest_crop(config, f)
    else:
        with pytest.raises(ValueError, match=rf"regularizer\.spectrum_masking.* of {cells} cells"):
            smallest_crop(config, f)
