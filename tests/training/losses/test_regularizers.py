"""The regularizers against scipy and closed forms; what must commute does; draws do not depend on the
batch."""

import math

import pytest
import torch
from torch import Tensor, nn

from latentcodec.randomness import Purpose, keyed_generator, keyed_normal, keyed_uniform
from latentcodec.training.losses import regularizers
from latentcodec.training.losses.regularizers import RegularizerConfig, Warp

# ---- keyed random numbers ----


def test_keyed_noise_does_not_depend_on_how_the_samples_are_batched() -> None:
    whole = keyed_normal(7, range(10, 18), (3, 4), Purpose.POSTERIOR)
    parts = [keyed_normal(7, torch.arange(a, a + 2), (3, 4), Purpose.POSTERIOR) for a in (10, 12, 14, 16)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[3:4], keyed_normal(7, [13], (3, 4), Purpose.POSTERIOR))


def test_another_seed_position_or_purpose_gives_other_noise() -> None:
    draws = [
        keyed_normal(seed, [position], (50,), purpose)
        for seed in (0, 1, 2**40)
        for position in (0, 1, 2**40)
        for purpose in (Purpose.POSTERIOR, Purpose.INTERPOLATIVE_NOISE)
    ]
    draws.append(keyed_normal(1, [23], (50,), 4))
    draws.append(keyed_normal(12, [3], (50,), 4))
    correlation = torch.corrcoef(torch.cat(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.7


def test_keyed_noise_is_standard_normal_and_uncorrelated_between_neighbours() -> None:
    noise = keyed_normal(0, range(400), (500,), Purpose.POSTERIOR)
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=0.05)
    assert (noise[1:] * noise[:-1]).mean().abs() < 0.01


def test_keyed_uniform_numbers_fill_the_unit_interval() -> None:
    u = keyed_uniform(0, range(4000), (2,), Purpose.LATENT_NOISE_LEVEL)
    assert (u.min() >= 0) & (u.max() < 1)
    assert u.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert torch.corrcoef(u.T)[0, 1].abs() < 0.05


def test_keyed_generators_agree_for_equal_keys_only_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    keys = [(0, 1, 2), (0, 2, 1), (1, 23), (12, 3), (0,), (0, 0), (-1,), (2**64,)]
    first = [torch.rand(4, generator=keyed_generator(*k)).tolist() for k in keys]
    again = [torch.rand(4, generator=keyed_generator(*k)).tolist() for k in keys]
    assert first == again
    assert len({tuple(numbers) for numbers in first}) == len(keys)
    assert torch.equal(torch.get_rng_state(), before)


def test_keyed_noise_is_the_same_in_every_version() -> None:
    """A run that is resumed after an update of a library must see the noise it would have seen."""
    noise = keyed_normal(0, [5], (3,), Purpose.POSTERIOR)
    torch.testing.assert_close(noise, torch.tensor([[-1.8566926, -1.2033145, -1.5873073]]), rtol=0, atol=1e-6)


# ---- equivariance ----


def block_means(f: int) -> nn.Module:
    """A codec that commutes with scale and rotation: its latent is the image averaged over f x f blocks."""
    return nn.AvgPool2d(f)


def test_an_equivariant_codec_sees_the_same_image_in_the_warped_latent() -> None:
    encode = block_means(4)
    ramp = torch.linspace(-1, 1, 32)
    x = torch.stack([ramp[:, None].expand(32, 32), ramp[None].expand(32, 32)])[None]
    for scale in regularizers.EQUIVARIANCE_SCALES:
        for turns in range(4):
            warp = Warp(scale, turns, of_latent=True)
            of_image = encode(regularizers.warp_image(x, warp, 4))
            inside = (..., slice(1, -1), slice(1, -1))  # a clamped sample at the border bends the ramp
            torch.testing.assert_close(of_image[inside], regularizers.warp_latent(encode(x), warp)[inside])


def test_quarter_turns_alone_commute_exactly_and_four_are_none() -> None:
    x = torch.randn(2, 3, 8, 12)
    for turns in (1, 2, 3):
        warp = Warp(1.0, turns, of_latent=True)
        turned = regularizers.warp_image(x, warp, 4)
        assert torch.equal(turned, torch.rot90(x, turns, (2, 3)))
        torch.testing.assert_close(block_means(4)(turned), regularizers.warp_latent(block_means(4)(x), warp))
    quarter = Warp(1.0, 1, of_latent=True)
    assert torch.equal(regularizers.warp_latent(regularizers.warp_latent(x, quarter), Warp(1.0, 3, True)), x)


@pytest.mark.parametrize("size", [(16, 16), (5, 7), (1, 3)])
def test_the_warped_target_is_f_times_the_warped_latent_for_every_scale(size: tuple[int, int]) -> None:
    z, x = torch.randn(1, 4, *size), torch.randn(1, 3, size[0] * 8, size[1] * 8)
    for scale in regularizers.EQUIVARIANCE_SCALES:
        warp = Warp(scale, 1, of_latent=True)
        small = regularizers.warp_latent(z, warp).shape[-2:]
        assert regularizers.warp_image(x, warp, 8).shape[-2:] == (small[0] * 8, small[1] * 8)


def test_warps_are_drawn_by_step_with_the_documented_shares() -> None:
    config = RegularizerConfig(equivariance_probability=0.5, low_resolution_probability=0.25)
    warps = [regularizers.draw_warp(config, 0, step) for step in range(2000)]
    assert warps == [regularizers.draw_warp(config, 0, step) for step in range(2000)]
    assert warps != [regularizers.draw_warp(config, 1, step) for step in range(2000)]
    assert warps[::2] != warps[1::2]
    of_latent = [w for w in warps if w is not None and w.of_latent]
    of_image = [w for w in warps if w is not None and not w.of_latent]
    assert len(of_latent) / 2000 == pytest.approx(0.5, abs=0.04)
    assert len(of_image) / 2000 == pytest.approx(0.125, abs=0.03)
    assert {w.turns for w in of_latent} == {1, 2, 3}
    assert {w.turns for w in of_image} == {0}
    assert {w.scale for w in of_latent} == set(regularizers.EQUIVARIANCE_SCALES)
    assert all(regularizers.draw_warp(RegularizerConfig(), 0, step) is None for step in range(50))


def test_the_downscaled_pair_fits_and_keeps_means_but_no_fine_detail() -> None:
    assert {regularizers.draw_downscale(0, step) for step in range(40)} == {2, 4}
    x, z = torch.randn(1, 3, 256, 256) + 2, torch.randn(1, 16, 64, 64) + 2
    for factor in (2, 4):
        small_x, small_z = regularizers.downscale_pair(x, z, factor)
        assert small_x.shape[-1] == 4 * small_z.shape[-1] == 256 // factor
        for small in (small_x, small_z):  # the mean of factor x factor samples has a std of 1 / factor
            assert small.mean().item() == pytest.approx(2, abs=0.05)
            assert small.std() < 0.8 / factor


# ---- noise ----


def test_noise_levels_follow_the_sample_not_the_batch() -> None:
    config = RegularizerConfig(latent_noise_share=0.5, interpolative_noise=0.8, additive_noise=2.0)
    whole = regularizers.draw_noise_levels(config, 3, range(3000))
    halves = [regularizers.draw_noise_levels(config, 3, range(a, a + 1500)) for a in (0, 1500)]
    for levels, *parts, largest in zip(whole, *halves, (0.8, 2.0), strict=True):
        assert torch.equal(levels, torch.cat(parts))
        noisy = levels[levels > 0]
        assert len(noisy) / 3000 == pytest.approx(0.5, abs=0.03)
        assert 0.95 * largest < noisy.max() < largest
        assert noisy.mean().item() == pytest.approx(largest / 2, rel=0.05)


def test_the_two_kinds_of_noise_have_the_same_samples_and_independent_levels() -> None:
    config = RegularizerConfig(latent_noise_share=0.5, interpolative_noise=0.8, additive_noise=2.0)
    replaced, added = regularizers.draw_noise_levels(config, 3, range(3000))
    assert torch.equal(replaced > 0, added > 0)
    pair = torch.stack([replaced, added])[:, replaced > 0]
    assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.1


def test_interpolated_and_added_noise_have_their_formulas() -> None:
    z, noise, level = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.5, 1.0])
    mixed = regularizers.interpolate_noise(z, noise, level, std=3.0)
    assert torch.equal(mixed[0], z[0])
    torch.testing.assert_close(mixed[1], 0.5 * z[1] + 1.5 * noise[1])
    torch.testing.assert_close(mixed[2], 3 * noise[2])
    added = regularizers.add_noise(z, noise, level, torch.tensor([2.0, 4.0]).view(1, 2, 1, 1))
    assert torch.equal(added[0], z[0])
    torch.testing.assert_close(added[1, 0], z[1, 0] + 0.5 * 2 * noise[1, 0])
    torch.testing.assert_close(added[1, 1], z[1, 1] + 0.5 * 4 * noise[1, 1])


def test_the_unit_has_the_value_of_the_step_before_and_grows_with_the_latents() -> None:
    """Of latents k times as large it must be k times as large: its derivative by k, at 1, is the unit itself."""
    deviation = torch.tensor([2.0, 4.0])
    z = deviation.view(1, 2, 1, 1) * torch.randn(8, 2, 64, 64)
    z, one, expected = (
        z - z.mean((2, 3), keepdim=True),
        torch.ones(()),
        deviation.view(1, 2, 1, 1).expand(8, -1, 1, 1),
    )

    def unit(k: Tensor, shift: Tensor) -> Tensor:
        return regularizers.unit_of(k * z + shift, shift.detach(), deviation)

    value, slope = torch.autograd.functional.jvp(lambda k: unit(k, torch.tensor(0.0)), one, one)
    assert torch.equal(value, expected)
    torch.testing.assert_close(slope.mean(0), expected[0], atol=0, rtol=0.05)
    _, slope = torch.autograd.functional.jvp(lambda shift: unit(one, shift), torch.tensor(5.0), one)
    assert slope.abs().max() < 1e-3  # to move all latents is not to grow


def test_the_unit_of_latents_that_do_not_vary_has_a_finite_gradient() -> None:
    z = torch.ones(2, 2, 4, 4, requires_grad=True)
    regularizers.unit_of(z, torch.ones(2), torch.zeros(2)).sum().backward()
    assert torch.equal(z.grad, torch.zeros_like(z))  # type: ignore[arg-type]


def test_the_round_trip_is_measured_in_deviations_of_each_channel() -> None:
    mean, unit = torch.randn(3, 2, 4, 4), torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    again = mean + unit / 2  # half a deviation in both channels
    torch.testing.assert_close(regularizers.round_trip_loss(again, mean, unit), torch.full((3,), 0.25))
    assert regularizers.round_trip_loss(mean, mean, unit).max() == 0


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"latent_noise_share": 0.5}, "regularizer.interpolative_noise"),
        ({"additive_noise": 0.5}, "regularizer.latent_noise_share"),
    ],
)
def test_noise_that_no_sample_would_get_is_refused_by_its_key(values: dict, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        RegularizerConfig(**values)


# ---- variance expansion ----


def test_variance_expansion_has_its_formula_and_is_bounded_by_its_floor() -> None:
    logvar = torch.tensor([[0.25, 1.0]]).log().view(1, 2, 1, 1)
    assert regularizers.variance_expansion_loss(logvar, 0.0).item() == pytest.approx((4 + 1) / 2)
    assert regularizers.variance_expansion_loss(
        torch.full((1, 2, 3, 3), -30.0), 0.01
    ).item() == pytest.approx(100)


def test_variance_expansion_settles_where_it_balances_the_reconstruction() -> None:
    """a sigma^2 + b / (sigma^2 + floor) is least at sigma^2 = sqrt(b / a) - floor."""
    logvar = nn.Parameter(torch.full((1, 1, 1, 1), -10.0))
    optimizer = torch.optim.Adam([logvar], 0.05)
    for _ in range(800):
        optimizer.zero_grad()
        (4 * logvar.exp().mean() + 0.1 * regularizers.variance_expansion_loss(logvar, 0.01).mean()).backward()
        optimizer.step()
    assert logvar.exp().item() == pytest.approx(math.sqrt(0.1 / 4) - 0.01, rel=1e-2)


def test_the_latent_tail_has_its_formula_and_pulls_towards_zero() -> None:
    z = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).requires_grad_()
    loss = regularizers.latent_tail_loss(z)
    assert loss.item() == pytest.approx((1 + math.e) / 2)
    loss.sum().backward()
    assert z.grad.flatten()[0] > 0 > z.grad.flatten()[1]
