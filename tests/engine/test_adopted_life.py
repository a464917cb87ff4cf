"""What else is done to a VAE on the engine: offloading, tiling, hooks, other storage; and what must not stay of it."""

import copy
import gc
import pickle
import sys
import weakref
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from diffusers.models.autoencoders.vae import DecoderOutput

sys.path.insert(0, str(Path(__file__).parents[1] / "vae"))
from small_vaes import small_vae

from latentcodec import LatentCodec, optimize_vae, restore_vae
from latentcodec.engine.networks import EngineDecoder
from latentcodec.ops import convolutions

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


def test_what_was_prepared_of_weights_goes_with_the_engine():
    """Packed weights of Qwen-Image's class, whose modules stay, lay beside the weights until the VAE died."""
    for kind in ("kl", "qwen"):
        vae = optimize_vae(small_vae(kind))
        with torch.no_grad():
            vae.decode(torch.randn(1, vae.config.get("z_dim") or 4, *[1] * (kind == "qwen"), 4, 4))
        layers = [layer for layer in vae.modules() if layer in convolutions._prepared]
        assert layers
        restore_vae(vae)
        assert not [layer for layer in layers if layer in convolutions._prepared]


@pytest.mark.parametrize("move", [lambda vae: vae.to("meta"), lambda vae: vae.bfloat16()])
def test_what_was_prepared_of_weights_goes_when_they_become_others(move):
    vae = optimize_vae(small_vae("kl"))
    with torch.no_grad():
        vae.decode(torch.randn(1, 4, 4, 4))
    layers = [layer for layer in vae.modules() if layer in convolutions._prepared]
    assert layers
    move(vae)
    assert not [layer for layer in layers if layer in convolutions._prepared]


def test_a_derived_class_cuts_tiles_in_its_own_way():
    class Seamed(AutoencoderKL):
        def tiled_decode(self, z, return_dict=True):
            return DecoderOutput(sample=torch.zeros(1))

    vae = optimize_vae(Seamed.from_config(small_vae("kl").config).eval())
    vae.enable_tiling()
    vae.tile_latent_min_size = 4
    with torch.no_grad():
        assert vae.decode(torch.randn(1, 4, 12, 12)).sample.shape == (1,)


def test_a_decoder_that_was_put_back_is_adopted_again():
    vae = optimize_vae(small_vae("kl"))
    with torch.device("meta"):
        stock = type(vae).from_config(vae.config).decoder
    stock.load_state_dict(vae.decoder.state_dict(), assign=True)
    vae.decoder = stock
    assert isinstance(optimize_vae(vae).decoder, EngineDecoder)


def test_a_check_leaves_the_callers_random_numbers(capsys):
    vae = small_vae("kl")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    optimize_vae(vae, check=True)
    assert torch.equal(torch.rand(1), expected)
    assert "encode in torch.float32" in capsys.readouterr().out


def test_a_hook_on_the_last_layer_is_called_once_a_picture():
    """Where the class takes over, it is the class that calls it."""
    vae, seen = optimize_vae(small_vae("qwen")), []
    vae.post_quant_conv.register_forward_hook(lambda *_: seen.append(1))
    vae.decoder.conv_in.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        vae.decode(torch.randn(1, 4, 1, 4, 4))
    assert len(seen) == 1


def test_weights_of_eight_bits_are_saved(tmp_path):
    codec = LatentCodec(small_vae("kl"))
    codec.vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    codec.save_pretrained(tmp_path / "codec")
    assert (tmp_path / "codec/diffusion_pytorch_model.safetensors").is_file()
