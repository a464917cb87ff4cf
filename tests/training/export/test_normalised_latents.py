"""Statistics of latents, and latents of unit variance or white, while every reconstruction stays as it was."""

import pytest
import torch
from diffusers import AutoencoderKL
from random_codecs import C_, F_, cells, copy_of, pictures, random_vae, raw

from latentcodec.codec import LatentCodec
from latentcodec.latents import LatentStatistics, fold, latent_statistics, whitening
from latentcodec.training.export.codec_folder import finish, write_codec
from latentcodec.training.start.linear import linear_start

# ---- the statistics ----


def test_streamed_moments_are_those_of_all_cells_at_once():
    vae, x = random_vae(), pictures(10)
    statistics = latent_statistics(vae, x.split(3))
    z = cells(raw(vae, x))
    assert torch.allclose(statistics.mean, z.mean(1), atol=1e-6)
    assert torch.allclose(statistics.covariance, torch.cov(z, correction=0), atol=1e-6)
    assert torch.allclose(statistics.std, z.std(1, correction=0), atol=1e-6)
    assert torch.allclose(
        statistics.logvar, cells(vae.encode(x).latent_dist.logvar).mean(1), rtol=1e-6, atol=1e-6
    )


def test_pixel_covariances_belong_to_the_block_over_the_cell():
    vae, x = random_vae(), pictures(4)
    z = cells(raw(vae, x))
    block = cells(x.unfold(2, F_, F_).unfold(3, F_, F_)[:, 1, :, :, 2, 3][:, None])[
        0
    ]  # one pixel of each, green
    expected = (block - block.mean()) @ (z - z.mean(1, keepdim=True)).T / z.shape[1]
    assert torch.allclose(latent_statistics(vae, [x]).pixels[1 * F_ * F_ + 2 * F_ + 3], expected, atol=1e-6)


def test_moments_of_two_processes_are_those_of_one():
    vae, x = random_vae(), pictures(8)
    shares = []
    for part in (x[::2], x[1::2]):  # what each of two processes would contribute to the sum of all
        latent_statistics(vae, part.split(2), lambda sums: shares.append(sums) or sums)
    two = latent_statistics(vae, x[::2].split(2), lambda sums: sum(shares))
    one = latent_statistics(vae, x.split(4))
    for name in ("mean", "covariance", "logvar", "pixels"):
        assert torch.allclose(getattr(one, name), getattr(two, name), rtol=1e-9, atol=1e-9), name


# ---- one scale, and each channel by itself ----


@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("normalise", ["per_channel", "one_scale"])
def test_folded_latents_have_unit_variance_for_the_codec_and_in_pipelines(tmp_path, normalise, quant):
    vae, x = random_vae(quant), pictures(16)
    before = raw(vae, x)
    y, std = vae.decode(before).sample, vae.encode(x).latent_dist.std
    finish(vae, normalise, latent_statistics(vae, [x]), [])
    write_codec(LatentCodec(vae), tmp_path / "codec", "card")
    codec = LatentCodec.from_pretrained(tmp_path / "codec")
    stock = AutoencoderKL.from_pretrained(tmp_path / "codec").eval()
    numbers = [stock.config[key] for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")]
    assert numbers == [1, 0, None, None]
    z = raw(stock, x)
    assert (codec.encode(x) - z).abs().max() < 1e-4
    if normalise == "per_channel":
        assert cells(z).mean(1).abs().max() < 1e-4
        assert (cells(z).std(1, correction=0) - 1).abs().max() < 1e-4
    else:  # directions and relative spreads stay
        assert z.mean().abs() < 1e-4
        assert abs(z.std(correction=0).item() - 1) < 1e-4
        assert torch.allclose(z.std() * (before - before.mean()) / before.std(), z, atol=1e-3)
    scale = cells(before).std(1) / cells(z).std(1)  # the posterior's spread is scaled exactly
    assert torch.allclose(codec.posterior(x)[1] * scale[:, None, None].float(), std, rtol=1e-3)
    assert (stock.decode(z).sample - y).abs().max() < 1e-4 * (y.max() - y.min())


# ---- the whitening ----


@pytest.mark.parametrize("quant", [False, True])
def test_whitening_leaves_every_reconstruction_as_it_was(quant):
    vae = random_vae(quant)
    white = copy_of(vae)
    fold(white, whitening(latent_statistics(vae, [pictures(16)])))
    for size in ((32, 32), (37, 50), (5, 3)):  # odd sizes, and images that are all border
        x = pictures(2, 64, seed=1)[:, :, : size[0], : size[1]]
        ours, theirs = LatentCodec(white), LatentCodec(vae)
        y = theirs.decode(theirs.encode(x), size)
        assert (ours.decode(ours.encode(x), size) - y).abs().max() < 1e-4 * (y.max() - y.min())


@pytest.mark.parametrize("quant", [False, True])
def test_whitened_latents_are_white_in_stock_pipelines(tmp_path, quant):
    vae, x = random_vae(quant), pictures(16)
    finish(vae, "whitened", latent_statistics(vae, [x]), [])
    write_codec(LatentCodec(vae), tmp_path / "codec", "card")
    stock = AutoencoderKL.from_pretrained(tmp_path / "codec").eval()
    assert stock.config.latents_mean is None  # of which SDXL's pipelines read exactly four
    assert stock.config.latents_std is None
    z = cells((raw(stock, x) - stock.config.shift_factor) * stock.config.scaling_factor)
    assert z.mean(1).abs().max() < 1e-4
    assert (torch.cov(z, correction=0) - torch.eye(C_)).abs().max() < 1e-3


def test_whitened_channels_are_ordered_by_the_pixels_they_explain():
    vae, x = random_vae(), pictures(16)
    fold(vae, whitening(latent_statistics(vae, [x])))
    patterns = latent_statistics(vae, [x]).pixels  # [C f f, c]: pixels per unit of each channel
    energy = patterns.square().sum(0)
    assert (energy.diff() <= 1e-4 * energy[0]).all()
    together = patterns.T @ patterns
    assert (together - torch.diag(energy)).abs().max() < 1e-3 * energy[0]
    largest = patterns.gather(0, patterns.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_whitening_finds_the_principal_components_in_any_mixture_of_them():
    vae, x = random_vae(block_out_channels=[16, 16, 16], norm_num_groups=2), pictures(64)
    linear_start(vae, list(x))  # the KLT: unit variance, by falling energy
    mixed = copy_of(vae)
    turn = torch.linalg.qr(torch.randn(C_, C_)).Q
    mixed.encoder.conv_out.weight[:C_] = torch.einsum("ab,bkij->akij", turn, vae.encoder.conv_out.weight[:C_])
    fold(mixed, whitening(latent_statistics(mixed, [x])))
    found, expected = cells(raw(mixed, x)), cells(raw(vae, x))
    assert (found * expected).mean(1)[
        :3
    ].min() > 0.9  # correlations, with their signs, while energies are far apart


def test_log_variances_of_a_mere_rescaling_are_exact():
    vae, x = random_vae(), pictures(8)
    statistics = latent_statistics(vae, [x])
    apart = LatentStatistics(
        statistics.mean, torch.diag(statistics.std**2), statistics.logvar, torch.eye(C_).double()
    )
    before = vae.encode(x).latent_dist
    fold(vae, whitening(apart))
    after = vae.encode(x).latent_dist.logvar.mean((0, 2, 3))
    expected = (before.logvar - 2 * statistics.std.log()[:, None, None].float()).mean(
        (0, 2, 3)
    )  # in another order
    assert torch.allclose(after.sort().values, expected.sort().values, atol=1e-4)


def test_log_variances_of_a_rotation_are_closer_to_the_marginal_ones_than_any_constant():
    vae, x = random_vae(), pictures(8)
    variance = cells(vae.encode(x).latent_dist.var)
    change = whitening(latent_statistics(vae, [x]))
    fold(vae, change)
    found = cells(vae.encode(x).latent_dist.logvar)
    marginal = (change.matrix.square() @ variance).log()
    assert (found <= marginal + 1e-4).all()  # it is a tangent of a convex function
    assert ((found - marginal).square().mean(1) < marginal.var(1)).all()
    assert (found - marginal).square().mean() < 0.5 * marginal.var(1).mean()


def test_a_dead_channel_is_not_blown_up():
    vae, x = random_vae(), pictures(8)
    vae.encoder.conv_out.weight[2] = 0
    parent = copy_of(vae)
    fold(vae, whitening(latent_statistics(vae, [x])))
    assert raw(vae, x).abs().max() < 100
    assert vae.quant_conv.weight.abs().max() < 1e4
    y = parent.decode(raw(parent, x)).sample
    assert (vae.decode(raw(vae, x)).sample - y).abs().max() < 1e-4 * (y.max() - y.min())
