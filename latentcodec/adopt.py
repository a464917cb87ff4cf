"""Encoder and Decoder of the VAE, and the ways into a genuine `diffusers.AutoencoderKL` and out of it.

The AutoencoderKL stays the owner: its class, its configuration, its state-dict keys and its `save_pretrained` are
untouched, so whatever we train or speed up is loaded by people who have never heard of this package. The
networks run on the engine (`engine/`), with the same numbers.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f = H / h downsampling factor.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from latentcodec.engine.checks import has_hooks
from latentcodec.engine.networks import EngineDecoder, EngineEncoder
from latentcodec.engine.plan import Engine
from latentcodec.vae.layers import ACTIVATIONS, Attention
from latentcodec.vae.networks import downsampling_factor

EQUAL_PROCESSORS: tuple[type, ...] = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
"""diffusers' processors that compute softmax(q k^T / sqrt(C)) v, each by other means: our layer gives their numbers."""


def build(config: Mapping[str, Any]) -> AutoencoderKL:
    """A new AutoencoderKL from keyword arguments of its constructor, running on our Encoder and Decoder.

    Missing keys take diffusers' defaults. Raises ValueError naming a key that AutoencoderKL does not have or a
    value that fits no AutoencoderKL.
    """
    unknown = (
        set(config) - set(AutoencoderKL._get_init_keys(AutoencoderKL)) - {"_class_name", "_diffusers_version"}
    )
    if unknown:
        raise ValueError(f"AutoencoderKL has no configuration key {', '.join(sorted(unknown))}")
    _check(config)
    return adopt(AutoencoderKL.from_config(dict(config)))


def adopt(vae: AutoencoderKL) -> AutoencoderKL:
    """Let our Encoder and Decoder run inside `vae`, in place; returns `vae`.

    The parameters are the very same objects: dtype, device, gradients and optimizers that hold them stay as they
    are, and so do the state-dict keys. `enable_tiling()` and `enable_slicing()` stay callable; tiling gives the
    exact result, because no tile is ever smaller than the image.

    Raises TypeError for anything but an AutoencoderKL, and ValueError for one whose encoder or decoder was
    changed (an adapter was added, layers were replaced), since such a model is no longer the one its config
    describes, or has hooks on its layers, which would be lost.
    """
    if not isinstance(vae, AutoencoderKL):
        raise TypeError(f"expected a diffusers.AutoencoderKL, got {type(vae).__name__}")
    if isinstance(vae.encoder, EngineEncoder):
        return vae
    with torch.device("meta"):  # only the structure: the parameters come from vae
        encoder, decoder = EngineEncoder(vae.config), EngineDecoder(vae.config)
    _replace_networks(vae, encoder, decoder)
    vae.tile_sample_min_size = vae.tile_latent_min_size = sys.maxsize
    return vae


def optimize_vae(
    vae: AutoencoderKL, max_memory: int | Literal["auto"] = "auto", check: bool = False
) -> AutoencoderKL:
    """Run any AutoencoderKL on our Encoder and Decoder, in place: same class, same keys, same numbers, faster.

    Without gradients both run in strips of rows, the pointwise work compiled: the first call in a new dtype takes
    some seconds for that, and says so. `max_memory` bounds the bytes of a pass, weights aside ("auto": half of what
    is free): inner feature maps that do not fit are computed twice instead of kept. A pass that cannot be had within
    the bound raises ValueError with the bytes it needs. `check` prints how far the results are from diffusers' own
    class, on random pictures of 256 x 256.

    Returns `vae`, which `restore_vae` turns back; raises what `adopt` raises.
    """
    adopt(vae)
    bound = None if max_memory == "auto" else max_memory
    for network in (vae.encoder, vae.decoder):
        network.engine = Engine(max_memory=bound, compiled=True)
    if check:
        _print_differences(vae)
    return vae


def restore_vae(vae: AutoencoderKL) -> AutoencoderKL:
    """Undo `adopt` and `optimize_vae`: diffusers' own encoder and decoder on the same parameters, and its tiling.

    In place; returns `vae`. Raises TypeError for anything but an AutoencoderKL.
    """
    if not isinstance(vae, AutoencoderKL):
        raise TypeError(f"expected a diffusers.AutoencoderKL, got {type(vae).__name__}")
    if isinstance(vae.encoder, EngineEncoder):
        with torch.device("meta"):
            stock = AutoencoderKL.from_config(vae.config)
        _replace_networks(vae, stock.encoder, stock.decoder)
        vae.tile_sample_min_size = stock.tile_sample_min_size
        vae.tile_latent_min_size = stock.tile_latent_min_size
    return vae


def _replace_networks(vae: AutoencoderKL, encoder: nn.Module, decoder: nn.Module) -> None:
    """Let `encoder` and `decoder` take over the parameters and the state of those that `vae` has.

    Raises ValueError where hooks are on layers that would be replaced, as offloading puts them there.
    """
    for name, module in (*vae.encoder.named_modules(), *vae.decoder.named_modules()):
        if has_hooks(module):
            raise ValueError(
                f"a hook, or a forward of its own, is on the VAE's {name or type(module).__name__}, and would be lost: "
                "optimise the VAE first, then add hooks or offload it"
            )
    for new, old in ((encoder, vae.encoder), (decoder, vae.decoder)):
        _share_parameters(new, old)
        _share_processors(new, old)
        new.train(old.training)
        new.gradient_checkpointing = old.gradient_checkpointing
        if old.gradient_checkpointing:
            new._gradient_checkpointing_func = old._gradient_checkpointing_func
    vae.encoder, vae.decoder = encoder, decoder


def _print_differences(vae: AutoencoderKL) -> None:
    """How far `vae`, and diffusers' own class in the same dtype, are from that class in float32."""
    exact = AutoencoderKL.from_config(vae.config).eval()
    exact.load_state_dict(vae.state_dict())
    exact.to(vae.device)
    stock = restore_vae(copy.deepcopy(vae))
    side = 256 // downsampling_factor(vae.config)
    x = torch.rand(1, vae.config.in_channels, 256, 256, device=vae.device) * 2 - 1
    z = torch.randn(1, vae.config.latent_channels, side, side, device=vae.device)
    for what, value in (("encode", x), ("decode", z)):
        results = []
        for model in (exact, vae, stock):
            given = value.to(model.dtype)
            with torch.no_grad():
                result = model._encode(given) if what == "encode" else model.decode(given).sample
            results.append(result.float())
        expected, ours, theirs = results
        errors = [(y - expected).abs().max() / (expected.max() - expected.min()) for y in (ours, theirs)]
        print(
            f"{what} in {vae.dtype}: {errors[0]:.1e} of the range from diffusers in float32"
            f" (diffusers itself in {vae.dtype}: {errors[1]:.1e})"
        )


def _share_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    parameters = dict(theirs.named_parameters())
    expected = {name: parameter.shape for name, parameter in ours.named_parameters()}
    if {name: parameter.shape for name, parameter in parameters.items()} != expected:
        differing = sorted(set(expected).symmetric_difference(parameters)) or sorted(
            name for name in expected if expected[name] != parameters[name].shape
        )
        raise ValueError(
            f"the VAE's parameters are not those of its config, first at {differing[0]!r}: adopt it before adding "
            "adapters or replacing layers"
        )
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        ours.get_submodule(module).register_parameter(leaf, parameter)


def _share_processors(new: nn.Module, old: nn.Module) -> None:
    """`attn_processors` of the VAE lists the same objects, under the same names, as before."""
    for name, module in new.named_modules():
        if isinstance(module, Attention):
            module.equal_processors = EQUAL_PROCESSORS
            module.set_processor(old.get_submodule(name).processor)


def _check(config: Mapping[str, Any]) -> None:
    """Reject, by key, what torch would reject later with a message about a layer deep inside."""
    groups = config.get("norm_num_groups", 32)
    for width in config.get("block_out_channels", ()):
        if width % groups:
            raise ValueError(f"block_out_channels: {width} is not divisible by norm_num_groups ({groups})")
    activation = config.get("act_fn", "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"act_fn: {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
