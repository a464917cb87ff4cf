"""What a micro-batch goes through before it is judged: noise, warps, smaller pictures, and how small they may get."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_objectives import F_DOWN, SEED, C, halving, images, never, new_objective
from small_runs import everything, small
from torch.nn import functional as F

from latentcodec.training.losses.regularizers import RegularizerConfig, draw_noise_levels
from latentcodec.training.losses.spectra import mask_spectrum
from latentcodec.training.preflight import smallest_crop


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


# ---- the smallest crop ----


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
