"""FLUX.2's, Qwen-Image's and Wan's VAE as people download them: one file, with the original repositories' keys."""

import json
import re

import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from small_vaes import CAUSAL, KL, SMALL

from latentcodec import LatentCodec

WAN = CAUSAL | dict(z_dim=16, num_res_blocks=2, dim_mult=[1, 2, 4, 4])
NUMBERS = ("latents_mean", "latents_std")


def wan_key(key):
    """diffusers' name of a tensor of Wan 2.1 -> the original one, for two blocks a stage in the encoder."""
    layers = {"norm1": "0", "conv1": "2", "norm2": "3", "conv2": "6"}

    def residual(rest):
        name, _, leaf = rest.partition(".")
        return f"shortcut.{leaf}" if name == "conv_shortcut" else f"residual.{layers[name]}.{leaf}"

    for ours, theirs in (("post_quant_conv.", "conv2."), ("quant_conv.", "conv1.")):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    part, _, rest = key.partition(".")
    if rest.startswith("conv_in."):
        return f"{part}.conv1.{rest.removeprefix('conv_in.')}"
    if rest.startswith(("norm_out.", "conv_out.")):
        return f"{part}.head.{rest.replace('norm_out', '0').replace('conv_out', '2')}"
    if found := re.match(r"mid_block\.resnets\.(\d)\.(.*)", rest):
        return f"{part}.middle.{2 * int(found[1])}.{residual(found[2])}"
    if found := re.match(r"mid_block\.attentions\.0\.(.*)", rest):
        return f"{part}.middle.1.{found[1]}"
    if found := re.match(r"down_blocks\.(\d+)\.((?:resample|time_conv).*)", rest):
        return f"{part}.downsamples.{found[1]}.{found[2]}"
    if found := re.match(r"down_blocks\.(\d+)\.(.*)", rest):
        return f"{part}.downsamples.{found[1]}.{residual(found[2])}"
    if found := re.match(r"up_blocks\.(\d)\.resnets\.(\d)\.(.*)", rest):
        return f"{part}.upsamples.{4 * int(found[1]) + int(found[2])}.{residual(found[3])}"
    found = re.match(r"up_blocks\.(\d)\.upsamplers\.0\.(.*)", rest)
    return f"{part}.upsamples.{4 * int(found[1]) + 3}.{found[2]}"


def flux2_key(key):
    """diffusers' name of a tensor of FLUX.2's VAE -> the original one."""
    for ours, theirs in (("post_quant_conv.", "decoder."), ("quant_conv.", "encoder.")):
        if key.startswith(ours):
            return theirs + key
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
    for ours, theirs in (
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
        ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
        ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ):
        key = key.replace(ours, theirs)
    return key


def same_weights(vae, other):
    mine, theirs = vae.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("keys", ["original", "diffusers"])
@pytest.mark.parametrize("kind", [AutoencoderKLWan, AutoencoderKLQwenImage])
def test_wans_and_qwens_file_is_loaded_with_the_classs_own_numbers(kind, keys, tmp_path):
    vae = kind(**{key: value for key, value in WAN.items() if key not in NUMBERS})
    state = vae.state_dict()
    if keys == "original":
        original = {wan_key(key): value for key, value in state.items()}
        assert convert_wan_vae_to_diffusers(original).keys() == state.keys()
        state = original
    save_file(state, tmp_path / "vae.safetensors")
    codec = LatentCodec.from_pretrained(tmp_path / "vae.safetensors")
    assert type(codec.vae) is AutoencoderKLWan
    assert same_weights(codec.vae, vae)
    assert [codec.vae.config[key] for key in NUMBERS] == [vae.config[key] for key in NUMBERS]
    config = {"_class_name": kind.__name__, **{k: v for k, v in vae.config.items() if not k.startswith("_")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(LatentCodec.from_pretrained(tmp_path / "vae.safetensors").vae) is kind


@pytest.mark.parametrize("keys", ["original", "diffusers"])
@pytest.mark.parametrize("decoder", [None, [128, 128, 160, 160]])
def test_flux2s_file_is_loaded_with_its_batch_norm(decoder, keys, tmp_path):
    widths = dict(block_out_channels=[128] * 4, norm_num_groups=32, decoder_block_out_channels=decoder)
    vae = AutoencoderKLFlux2(**KL | widths | dict(latent_channels=8))
    vae.bn.running_mean.normal_()
    state = vae.state_dict()
    if keys == "original":
        state = {flux2_key(key): value for key, value in state.items() if "num_batches" not in key}
        state = {
            key: value[:, :, None, None] if ".attn_1." in key and value.ndim == 2 else value
            for key, value in state.items()
        }
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "ae.safetensors")
    codec = LatentCodec.from_pretrained(tmp_path / "ae.safetensors")
    assert type(codec.vae) is AutoencoderKLFlux2
    assert same_weights(codec.vae, vae)
    assert codec.latent_channels == 32


def test_numbers_that_no_file_holds_are_asked_for(tmp_path):
    vae = AutoencoderKLWan(**WAN | dict(z_dim=48, latents_mean=[0.0] * 48, latents_std=[1.0] * 48))
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(
        ValueError, match=r"how these 48 latent channels are scaled; put the model's config\.json"
    ):
        LatentCodec.from_pretrained(tmp_path / "vae.safetensors")


def test_wan_22_is_asked_for_its_config_and_loads_with_it(tmp_path):
    kind, config = SMALL["wan22"]
    vae = kind(**config)
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"such as Wan 2\.2's, .*; put the model's config\.json beside"):
        LatentCodec.from_pretrained(tmp_path / "vae.safetensors")
    vae.save_config(tmp_path)
    assert same_weights(LatentCodec.from_pretrained(tmp_path / "vae.safetensors").vae, vae)
