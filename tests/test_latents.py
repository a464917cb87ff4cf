"""Latents of every covered class: shapes, posteriors, packing, numbers, and what a fingerprint covers.

That the numbers are those of the stock pipelines is in test_pipeline_latents.py.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Pipeline

sys.path.insert(0, str(Path(__file__).parent / "vae"))
from small_vaes import CAUSAL_NAMES, FLUX2_NAMES, SMALL, small_vae

from latentcodec import LatentCodec
from latentcodec.latents import LatentSpace

SHAPES = {
    "kl": (4, 8),
    "flux2": (16, 16),
    "flux2-small-decoder": (16, 16),
    "wan22": (4, 16),
    "qwen21": (4, 16),
}


def codec_of(name, **others):
    return LatentCodec(small_vae(name, **others))


# ---- shapes


@pytest.mark.parametrize("name", SMALL)
def test_latents_have_the_familys_channels_and_cells_for_every_size(name):
    codec = codec_of(name)
    c, f = SHAPES.get(name, (4, 8))
    assert (codec.latent_channels, codec.downsampling_factor) == (c, f)
    for height, width in ((1, 1), (f, 2 * f), (2 * f + 1, f - 1)):
        x = torch.rand(2, codec.image_channels, height, width) * 2 - 1
        z = codec.encode(x)
        assert z.shape == (2, c, -(-height // f), -(-width // f))
        assert z.dtype == torch.float32
        assert codec.decode(z, size=(height, width)).shape == x.shape


@pytest.mark.parametrize("name", SMALL)
def test_the_posterior_is_that_of_encode(name):
    codec = codec_of(name)
    x = torch.rand(1, codec.image_channels, 40, 33) * 2 - 1
    mean, std = codec.posterior(x)
    assert torch.equal(mean, codec.encode(x))
    assert mean.shape == std.shape
    assert (std > 0).all()
    draws = torch.stack(
        [codec.encode(x, sample=True, generator=torch.Generator().manual_seed(i)) for i in range(64)]
    )
    ratio = (draws - mean).square().mean(0).sqrt() / std
    assert abs(ratio.mean().item() - 1) < 0.1


# ---- the formulas


def test_flux2_normalises_packed_latents_by_its_batch_norm():
    codec = codec_of("flux2")
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        raw = codec.vae.encode(x).latent_dist.mode()
    packed = Flux2Pipeline._patchify_latents(raw)
    bn = codec.vae.bn
    expected = (packed - bn.running_mean.view(1, -1, 1, 1)) / (bn.running_var.view(1, -1, 1, 1) + 1e-4).sqrt()
    assert torch.allclose(codec.encode(x), expected, atol=1e-5)
    with torch.no_grad():
        image = codec.vae.decode(raw).sample
    assert (codec.decode(codec.encode(x)) - image).abs().max() <= 1e-5 * (image.max() - image.min())


@pytest.mark.parametrize("name", CAUSAL_NAMES)
def test_qwen_and_wan_normalise_each_channel(name):
    codec = codec_of(name)
    config = codec.vae.config
    x = torch.rand(1, codec.image_channels, 32, 32) * 2 - 1
    with torch.no_grad():
        raw = codec.vae.encode(x[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    assert torch.allclose(codec.encode(x), (raw - mean) / std, atol=1e-6)


@pytest.mark.parametrize("values", [[0.0, 1, 1, 1], [-1.0, 1, 1, 1], [float("nan"), 1, 1, 1], [1.0, 1, 1]])
def test_numbers_that_cannot_normalise_are_refused(values):
    with pytest.raises(ValueError, match="of the latents"):
        codec_of("qwen", latents_std=values)
    with pytest.raises(ValueError, match="of the latents"):
        codec_of("kl", latents_mean=[0.0] * len(values), latents_std=values)


def test_packing_is_that_of_the_pipelines_and_undone():
    raw = torch.randn(2, 4, 6, 8)
    space = LatentSpace(2, torch.zeros(16, 1, 1), torch.ones(16, 1, 1))
    assert torch.equal(space.pack(raw), Flux2Pipeline._patchify_latents(raw))
    assert torch.equal(space.restore(space.normalise(raw)), raw)


# ---- the fingerprint


@pytest.mark.parametrize("name", SMALL)
def test_the_fingerprint_is_the_same_after_save_and_load_and_in_any_dtype(name, tmp_path):
    codec = codec_of(name)
    expected = codec.fingerprint
    assert int(expected, 16) >> 256 == 0
    assert len(expected) == 64
    assert LatentCodec(SMALL[name][0].from_config(codec.vae.config)).fingerprint != expected
    codec.save_pretrained(tmp_path)
    loaded = LatentCodec.from_pretrained(tmp_path)
    assert type(loaded.vae) is SMALL[name][0]
    assert loaded.fingerprint == expected
    half = LatentCodec.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.fingerprint == expected
    with torch.no_grad():
        half.vae.decoder.conv_out.bias[0] += 1
    assert half.fingerprint != expected
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"_diffusers_version": "9", "_name_or_path": "x"})
    )
    assert LatentCodec.from_pretrained(tmp_path).fingerprint == expected


@pytest.mark.parametrize(
    ("name", "key", "same", "other"),
    [
        ("flux2", "decoder_block_out_channels", [8, 8, 16, 16], [4, 8, 8, 12]),
        ("wan21", "decoder_base_dim", 12, 8),
    ],
)
def test_a_width_that_is_so_anyway_is_not_in_the_fingerprint(name, key, same, other):
    """Files without a configuration tell the decoder's widths, where a configuration says None."""
    others = {} if name == "flux2" else dict(base_dim=12)
    unsaid, said = (small_vae(name, **others | {key: value}) for value in (None, same))
    said.load_state_dict(unsaid.state_dict())
    assert LatentCodec(said).fingerprint == LatentCodec(unsaid).fingerprint
    said.register_to_config(**{key: other})
    assert LatentCodec(said).fingerprint != LatentCodec(unsaid).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_weight_and_number_is_in_the_fingerprint(name):
    codec = codec_of(name)
    seen = {codec.fingerprint}
    tensors = [value for value in codec.vae.state_dict().values() if value.is_floating_point()]
    for tensor in tensors:
        tensor.view(-1)[-1] += 1
        seen.add(codec.fingerprint)
    assert len(seen) == len(tensors) + 1
    if name not in FLUX2_NAMES:
        changed = [2.0] * codec.latent_channels
        codec.vae.register_to_config(latents_mean=changed, latents_std=changed)
        assert codec.fingerprint not in seen
    assert hashlib.sha256().hexdigest() not in seen
