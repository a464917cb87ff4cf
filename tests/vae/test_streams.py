"""Streams of strips equal diffusers' own class for one image, whatever the height of a strip."""

import re
import sys
from pathlib import Path

import pytest
import torch
from small_vaes import CAUSAL_NAMES, relative_error, small_vae

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from test_memory import LiveBytes

from latentcodec import optimize_vae
from latentcodec.engine.streams import StreamPass
from latentcodec.ops.functional import fastest_kernels
from latentcodec.ops.native import winograd
from latentcodec.ops.native.build import library
from latentcodec.ops.native.convolution import Workspace
from latentcodec.ops.pointwise import REFERENCE_KERNELS
from latentcodec.vae.causal import ImageDecoder, ImageEncoder, to_channels, to_pixels
from latentcodec.vae.families import family_of

WHOLE = 1 << 30


def stream(strip_bytes, kernels=REFERENCE_KERNELS, workspace=None):
    return StreamPass(torch.float32, kernels, strip_bytes, 1 << 20, torch.empty(0), workspace)


def image_of(strips):
    return torch.cat(strips, 1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("strip_bytes", [1, 3000, 20_000, WHOLE])
@pytest.mark.parametrize("name", CAUSAL_NAMES)
def test_encoders_in_strips_of_every_height_equal_the_class(name, strip_bytes):
    vae = small_vae(name)
    family = family_of(vae)
    f = family.raw_factor(vae.config)
    x = torch.rand(2, family.image_channels(vae.config), 5 * f, 3 * f) * 2 - 1
    with torch.inference_mode():
        expected = vae.encode(x[:, :, None]).latent_dist.parameters
        patches = to_channels(x, family.patch(vae.config))
        moments = image_of(stream(strip_bytes).encode(ImageEncoder(vae.encoder), patches))
        assert relative_error(vae.quant_conv(moments[:, :, None]), expected) <= 1e-5


@pytest.mark.parametrize("strip_bytes", [1, 3000, WHOLE])
@pytest.mark.parametrize("size", [(8, 8), (9, 15), (45, 27), (63, 34)])
def test_odd_images_in_strips_equal_the_class(size, strip_bytes):
    vae = small_vae("qwen")
    x = torch.rand(1, 3, *size) * 2 - 1
    with torch.inference_mode():
        expected = vae.encode(x[:, :, None]).latent_dist.parameters
        moments = image_of(stream(strip_bytes).encode(ImageEncoder(vae.encoder), x))
        assert relative_error(vae.quant_conv(moments[:, :, None]), expected) <= 1e-5


@pytest.mark.parametrize("strip_bytes", [1, 3000, 20_000, WHOLE])
@pytest.mark.parametrize("name", CAUSAL_NAMES)
def test_decoders_in_strips_of_every_height_equal_the_class(name, strip_bytes):
    vae = small_vae(name)
    z = torch.randn(2, vae.config.z_dim, 7, 3)
    with torch.inference_mode():
        expected = vae.decode(z[:, :, None]).sample[:, :, 0]
        after = vae.post_quant_conv(z[:, :, None])[:, :, 0]
        image = image_of(stream(strip_bytes).decode(ImageDecoder(vae.decoder), after))
        image = to_pixels(image, family_of(vae).patch(vae.config)).clamp(-1, 1)
        assert relative_error(image, expected) <= 1e-5


@pytest.mark.parametrize("strip_bytes", [1 << 16, WHOLE])
@pytest.mark.parametrize("name", ["qwen", "wan22"])
def test_wide_layers_run_as_winograd_s_convolutions(name, strip_bytes, monkeypatch):
    vae = small_vae(name, base_dim=64, **(dict(decoder_base_dim=64) if name == "wan22" else {}))
    used, convolve = [], winograd.convolve
    monkeypatch.setattr(
        winograd, "convolve", lambda *given: used.append(given[4].doubles) or convolve(*given)
    )
    z = torch.randn(1, vae.config.z_dim, 8, 6)
    with torch.inference_mode():
        expected = vae.decode(z[:, :, None]).sample[:, :, 0]
        after = vae.post_quant_conv(z[:, :, None])[:, :, 0]
        fast = stream(strip_bytes, fastest_kernels("cpu"), Workspace())
        image = image_of(fast.decode(ImageDecoder(vae.decoder), after))
        image = to_pixels(image, family_of(vae).patch(vae.config)).clamp(-1, 1)
    assert {True, False} <= set(used)  # of doubled maps, and of others
    assert relative_error(image, expected) <= 1e-4


@pytest.mark.parametrize("name", ["qwen", "wan22"])
@pytest.mark.parametrize("keep_packed", [True, False])
def test_a_pass_stays_within_the_bytes_that_it_says_it_needs(name, keep_packed):
    """The weights and all that is prepared of them included."""
    vae = small_vae(name, base_dim=64, **(dict(decoder_base_dim=64) if name == "wan22" else {}))
    z = torch.randn(1, vae.config.z_dim, 1, 12, 10)
    with torch.no_grad():
        expected = vae.decode(z).sample
        optimize_vae(vae, max_memory=1, keep_packed=keep_packed)
        with pytest.raises(ValueError, match="max_memory 1 bytes is too little") as refusal:
            vae.decode(z)
        least = int(re.search(r"needs ([\d,]+),", str(refusal.value))[1].replace(",", ""))
        optimize_vae(vae, max_memory=least, keep_packed=keep_packed)
        weights = sum(weight.numel() * 4 for weight in vae.decoder.parameters())
        with LiveBytes(vae, z) as live:
            result = vae.decode(z).sample
    assert relative_error(result, expected) <= 1e-4
    assert 0.2 * least < live.peak + weights <= least


def test_a_bound_counts_the_whole_batch():
    vae = optimize_vae(small_vae("qwen"), max_memory=1)
    needed = []
    for batch in (1, 2, 3):
        with torch.no_grad(), pytest.raises(ValueError, match="max_memory 1 bytes is too little") as refusal:
            vae.decode(torch.randn(batch, vae.config.z_dim, 1, 12, 10))
        needed.append(int(re.search(r"needs ([\d,]+),", str(refusal.value))[1].replace(",", "")))
    assert needed[2] - needed[1] == needed[1] - needed[0] > 0


@pytest.mark.parametrize("name", CAUSAL_NAMES)
def test_bfloat16_without_units_is_computed_in_float32(name, monkeypatch):
    monkeypatch.setenv("LATENTCODEC_DTYPE", "float32")  # as on a machine that would emulate it
    vae = small_vae(name)
    torch.nn.Module.to(vae, torch.bfloat16)
    exact = small_vae(name)
    exact.load_state_dict(vae.state_dict())
    assert library() is not None
    optimize_vae(vae)
    f = family_of(vae).raw_factor(vae.config)
    x = (torch.rand(1, family_of(vae).image_channels(vae.config), 1, 4 * f, 4 * f) * 2 - 1).bfloat16()
    with torch.no_grad():
        ours, expected = vae.encode(x).latent_dist.mean.float(), exact.encode(x.float()).latent_dist.mean
    assert (ours - expected).abs().max() <= 0.02 * expected.abs().max()
