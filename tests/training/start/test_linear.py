"""The linear start is what it claims: the KLT in the encoder, and behind it a linear decoder nearly as good."""

import pytest
import torch
import torch.nn.functional as F

from latentcodec.adopt import build
from latentcodec.codec import LatentCodec
from latentcodec.quality.klt import KLT
from latentcodec.quality.metrics import psnr
from latentcodec.sources.synthetic import SyntheticSource
from latentcodec.training.start.least_squares import least_squares, least_squares_doubled
from latentcodec.training.start.linear import (
    linear_start,
    zero_residuals,
)


def architecture(channels=(16, 32), groups=4, latent=4, **others):
    return dict(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=groups,
        latent_channels=latent,
        scaling_factor=1.0,
        **others,
    )


@pytest.fixture(scope="module")
def crops():
    source = SyntheticSource(3)
    return [source.read(index)[:, 64:112, 64:112].contiguous() for index in range(24)]


@pytest.mark.parametrize(
    "configuration",
    [
        architecture(),
        architecture(
            channels=(16, 16)
        ),  # no shortcut convolution: the pairs are laid out by the resampling layer
        architecture(channels=(16, 32, 32), latent=8, use_quant_conv=False, use_post_quant_conv=False),
        architecture(mid_block_add_attention=False),
    ],
)
def test_the_encoder_starts_as_the_klt_and_the_decoder_near_it(crops, configuration):
    vae = build(configuration)
    linear_start(vae, crops)
    codec = LatentCodec(vae)
    klt = KLT.fit(crops, codec.downsampling_factor, codec.latent_channels)
    x = torch.stack(crops)
    z = codec.encode(x)
    assert (z - klt.encode(x)).abs().max() < 5e-3 * z.abs().max()
    ours, reference = (psnr(x, c.decode(z)).mean() for c in (codec, klt))
    assert ours > reference - 4.0, f"{ours:.2f} dB against the KLT's {reference:.2f}"


def test_least_squares_of_a_doubled_map_are_those_of_the_map_once_it_is_doubled():
    h, target = torch.randn(9, 5, 6, 7), torch.randn(9, 3, 12, 14)
    expected = least_squares(F.interpolate(h, scale_factor=2.0, mode="nearest"), target)
    for one, other in zip(least_squares_doubled(h, target), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_least_squares_of_a_part_of_the_positions_serve_rows_of_either_parity(monkeypatch):
    """A map that was doubled before is another at even rows than at odd ones."""
    coarse = torch.randn(8, 4, 25, 25)
    h = F.interpolate(coarse, scale_factor=2.0, mode="nearest")
    target = torch.randn(8, 1, 50, 50) + F.conv2d(h, torch.randn(1, 4, 3, 3), padding=1)
    whole = least_squares(h, target)
    monkeypatch.setattr("latentcodec.training.start.least_squares.ENOUGH_POSITIONS", 6000)
    errors = [
        (F.conv2d(h, *found, padding=1) - target).square().mean()
        for found in (whole, least_squares(h, target))
    ]
    assert errors[1] < 1.02 * errors[0]


def test_the_first_posterior_is_narrow(crops):
    vae = build(architecture())
    linear_start(vae, crops)
    with torch.no_grad():
        assert torch.allclose(vae.encode(crops[0][None]).latent_dist.std, torch.tensor(0.01), rtol=1e-3)


def test_a_greyscale_codec_starts_linear_too(crops):
    grey = [crop.mean(0, keepdim=True) for crop in crops]
    vae = build(architecture(in_channels=1, out_channels=1))
    linear_start(vae, grey)
    x = torch.stack(grey)
    codec = LatentCodec(vae)
    assert psnr(x, codec.decode(codec.encode(x))).mean() > 28


def test_too_narrow_groups_name_the_keys(crops):
    with pytest.raises(ValueError, match="norm_num_groups 16"):
        linear_start(build(architecture(channels=(32, 32), groups=16, latent=12)), crops)


def test_a_single_stage_names_the_key(crops):
    with pytest.raises(ValueError, match="block_out_channels"):
        linear_start(build(architecture(channels=(16,), latent=3)), crops)


def test_zeroed_residuals_leave_the_shortcut_path():
    vae = build(architecture(mid_block_add_attention=True))
    zero_residuals(vae)
    h = torch.randn(1, 32, 5, 6)
    with torch.no_grad():
        assert torch.equal(vae.encoder.mid_block(h), h)
