"""Encoder and Decoder of the VAE, and the ways into a genuine `diffusers.AutoencoderKL` and out of it.

The AutoencoderKL stays the owner: its class, its configuration, its state-dict keys and its `save_pretrained` are
untouched, so whatever we train or speed up is loaded by people who have never heard of this package. Without
gradients the networks run in strips (`engine.py`), with the same numbers.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f = H / h downsampling factor.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latentcodec.blocks import ACTIVATIONS, DownStage, Shape, UNetMidBlock2D, UpStage, group_norm
from latentcodec.engine import Engine
from latentcodec.fused import is_listened_to, normalised

# Whether the stages of a block type carry attention; the only types that an AutoencoderKL can be built from.
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


def downsampling_factor(config: Mapping[str, Any]) -> int:
    """f: pixels of image per latent cell, along each side."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


class Encoder(nn.Module):
    """Image to posterior moments: [B, C, H, W] in [-1, 1] -> [B, 2c, H / f, W / f] (mean, log-variance).

    `config` is that of an AutoencoderKL. Raises ValueError naming the key that no AutoencoderKL could have.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels, groups, activation = _widths(config)
        attention = _attention_per_stage(config, "down_block_types", DOWN_BLOCKS)
        shapes = _shapes(config, channels, config["layers_per_block"], attention)
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownStage(shape, downsample=i < len(channels) - 1) for i, shape in enumerate(shapes)
        )
        self.mid_block = UNetMidBlock2D(channels[-1], groups, activation, config["mid_block_add_attention"])
        self.conv_norm_out = group_norm(channels[-1], groups)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], 2 * config["latent_channels"], 3, padding=1)
        self.gradient_checkpointing = False  # diffusers' enable_gradient_checkpointing() sets it
        self.engine = Engine()

    def forward(self, x: Tensor) -> Tensor:
        if self.engine.applies(self, x):
            return self.engine.encode(self, x)
        x = self.conv_in(x)  # [B, C0, H, W]
        for stage in self.down_blocks:
            x = _run(self, stage, x)  # [B, Ci, H / 2^i, W / 2^i]
        x = _run(self, self.mid_block, x)
        return self.conv_out(normalised(x, self.conv_norm_out, self.conv_act))  # [B, 2c, h, w]


class Decoder(nn.Module):
    """Latents to image: [B, c, h, w] -> [B, C, h * f, w * f], in [-1, 1] up to the reconstruction error.

    `config` is that of an AutoencoderKL. Raises ValueError naming the key that no AutoencoderKL could have.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels, groups, activation = _widths(config)
        channels = channels[::-1]
        attention = _attention_per_stage(config, "up_block_types", UP_BLOCKS)
        # The decoder is one block a stage deeper than the encoder.
        shapes = _shapes(config, channels, config["layers_per_block"] + 1, attention)
        self.conv_in = nn.Conv2d(config["latent_channels"], channels[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            UpStage(shape, upsample=i < len(channels) - 1) for i, shape in enumerate(shapes)
        )
        self.mid_block = UNetMidBlock2D(channels[0], groups, activation, config["mid_block_add_attention"])
        self.conv_norm_out = group_norm(channels[-1], groups)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], config["out_channels"], 3, padding=1)
        self.gradient_checkpointing = False  # diffusers' enable_gradient_checkpointing() sets it
        self.engine = Engine()

    def forward(self, z: Tensor) -> Tensor:
        if self.engine.applies(self, z):
            return self.engine.decode(self, z)
        x = self.conv_in(z)  # [B, C0, h, w]
        x = _run(self, self.mid_block, x)
        for stage in self.up_blocks:
            x = _run(self, stage, x)  # [B, Ci, h * 2^(i+1), w * 2^(i+1)]
        return self.conv_out(normalised(x, self.conv_norm_out, self.conv_act))  # [B, C, H, W]


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
    if isinstance(vae.encoder, Encoder):
        return vae
    with torch.device("meta"):  # only the structure: the parameters come from vae
        encoder, decoder = Encoder(vae.config), Decoder(vae.config)
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
    if isinstance(vae.encoder, Encoder):
        with torch.device("meta"):
            stock = AutoencoderKL.from_config(vae.config)
        _replace_networks(vae, stock.encoder, stock.decoder)
        vae.tile_sample_min_size = stock.tile_sample_min_size
        vae.tile_latent_min_size = stock.tile_latent_min_size
    return vae


def _replace_networks(vae: AutoencoderKL, encoder: nn.Module, decoder: nn.Module) -> None:
    """Let `encoder` and `decoder` take over the parameters and the state of those that `vae` has.

    Raises ValueError where something listens to layers that would be replaced, as offloading does.
    """
    for name, module in (*vae.encoder.named_modules(), *vae.decoder.named_modules()):
        if is_listened_to(module):
            raise ValueError(
                f"a hook, or a forward of its own, is on the VAE's {name or type(module).__name__}, and would be lost: "
                "optimise the VAE first, then add hooks or offload it"
            )
    for new, old in ((encoder, vae.encoder), (decoder, vae.decoder)):
        _share_parameters(new, old)
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


def _run(network: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), keeping only its input for the backward pass where gradient checkpointing is on."""
    if network.gradient_checkpointing and torch.is_grad_enabled():
        return cast(Callable[..., Tensor], network._gradient_checkpointing_func)(layer, x)
    return layer(x)


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


def _attention_per_stage(config: Mapping[str, Any], key: str, known: Mapping[str, bool]) -> list[bool]:
    for block_type in config[key]:
        if block_type not in known:
            raise ValueError(
                f"{key}: {block_type!r} is not a block of AutoencoderKL; it has {', '.join(known)}"
            )
    if len(config[key]) != len(config["block_out_channels"]):
        raise ValueError(
            f"{key} has {len(config[key])} entries, block_out_channels has {len(config['block_out_channels'])}: "
            "each width needs one block type"
        )
    return [known[block_type] for block_type in config[key]]


def _shapes(
    config: Mapping[str, Any], channels: list[int], layers: int, attention: list[bool]
) -> list[Shape]:
    """Of the stages in the order in which they run, `channels` being their widths."""
    _, groups, activation = _widths(config)
    return [
        Shape(before, after, layers, groups, activation, attends)
        for before, after, attends in zip([channels[0], *channels], channels, attention, strict=False)
    ]


def _widths(config: Mapping[str, Any]) -> tuple[list[int], int, str]:
    return list(config["block_out_channels"]), config["norm_num_groups"], config["act_fn"]


def _check(config: Mapping[str, Any]) -> None:
    """Reject, by key, what torch would reject later with a message about a layer deep inside."""
    groups = config.get("norm_num_groups", 32)
    for width in config.get("block_out_channels", ()):
        if width % groups:
            raise ValueError(f"block_out_channels: {width} is not divisible by norm_num_groups ({groups})")
    activation = config.get("act_fn", "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"act_fn: {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
