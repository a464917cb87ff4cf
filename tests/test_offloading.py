"""Codecs and pipelines whose VAE is offloaded, and a VAE that nothing keeps alive."""

import copy
import gc
import pickle
import weakref

import accelerate
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder
from vae.small_vaes import small_vae

from latentcodec import LatentCodec, optimize_vae

X = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


class Pipeline:
    def __init__(self, vae):
        self.vae = vae

    def register_modules(self, vae):
        self.vae = vae


@pytest.mark.parametrize("kind", ["kl", "flux2", "qwen"])
def test_a_codec_whose_weights_are_fetched_for_each_layer_gives_the_same_numbers(kind):
    """Inputs were sent to where the weights lie between passes, which is nowhere."""
    codec = LatentCodec(small_vae(kind))
    z = codec.encode(X)
    y = codec.decode(z)
    accelerate.cpu_offload(codec.vae, execution_device=torch.device("cpu"))
    assert codec.device.type == "meta"
    torch.testing.assert_close(codec.encode(X), z, rtol=0, atol=1e-4)
    torch.testing.assert_close(codec.decode(z), y, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"no fingerprint, for .* is offloaded; do it before offloading"):
        _ = codec.fingerprint


def test_plugging_in_place_of_a_vae_that_is_offloaded_in_groups_is_refused():
    vae = small_vae("kl")
    vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="plug in first, then offload"):
        LatentCodec(small_vae("kl")).plug_into(Pipeline(vae))


def test_plugging_in_place_of_a_vae_for_clips_is_refused():
    """Stable Video Diffusion's pipeline calls `decode` with a number of frames."""
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    with pytest.raises(ValueError, match="works on the latents of AutoencoderKLTemporalDecoder"):
        LatentCodec(small_vae("kl")).plug_into(Pipeline(vae))


@pytest.mark.parametrize("kind", ["kl", "qwen"])
def test_a_vae_is_freed_as_soon_as_nobody_holds_it(kind):
    """`del pipe; torch.cuda.empty_cache()` kept the weights until the next full collection."""
    vae = optimize_vae(small_vae(kind))
    for twin in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        name = "_decode" if kind == "qwen" else "tiled_decode"
        assert twin.__dict__[name].vae() is twin
    gc.collect()
    gc.disable()
    try:
        seen = weakref.ref(vae)
        del vae
        assert seen() is None
    finally:
        gc.enable()


def test_what_tiles_where_the_engine_steps_aside_is_the_class_itself():
    """With hooks on the layers a whole picture ran through the plain modules, though tiling was on."""
    vae = optimize_vae(small_vae("kl"))
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 4, 4 * vae.config.sample_size
    seen = []
    hook = vae.decoder.conv_in.register_forward_pre_hook(
        lambda layer, inputs: seen.append(inputs[0].shape[-1])
    )
    z = torch.randn(1, vae.config.latent_channels, 12, 12)
    with torch.no_grad():
        vae.decode(z)
    assert len(seen) > 1
    assert max(seen) == 4
    hook.remove()
    whole = copy.deepcopy(vae)
    whole.disable_tiling()
    with torch.no_grad():
        assert torch.equal(vae.decode(z).sample, whole.decode(z).sample)
