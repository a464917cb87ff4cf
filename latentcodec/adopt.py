"""The ways into a VAE of diffusers and out of it: its networks run on the engine (`engine/`), with the same numbers.

The VAE stays the owner: its class, its configuration, its state-dict keys and its `save_pretrained` are untouched, so
whatever we train or speed up is loaded by people who have never heard of this package. Only this file changes objects
of diffusers' classes; what differs between the classes is in `vae/families.py`.

`AutoencoderKL` and `AutoencoderKLFlux2` get our Encoder and Decoder. Qwen-Image's and Wan's classes keep their modules,
which they count and to which clips of several frames go; single images go past them.

Shapes: B batch, C image channels, s raw latent channels, H W pixels, h w raw latent cells.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from latentcodec.engine.images import ImageNetworks
from latentcodec.engine.memory import parse_bytes
from latentcodec.engine.networks import EngineDecoder, EngineEncoder, is_on_engine
from latentcodec.engine.plan import Engine, forget
from latentcodec.engine.sharing import require_as_built, require_parameters_of, take_over
from latentcodec.ops.native.build import library_if_built
from latentcodec.stock import CLASSES, new_stock, print_differences
from latentcodec.vae.causal import ImageDecoder, ImageEncoder
from latentcodec.vae.families import KL, family_named, family_of
from latentcodec.vae.networks import check_widths
from latentcodec.vae.padding import PADDING_KEY, padding_modes, set_padding_mode

EQUAL_PROCESSORS: tuple[type, ...] = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
"""diffusers' processors that compute softmax(q k^T / sqrt(C)) v, each by other means: our layer gives their numbers."""

NETWORKS = ("encoder", "decoder")
ADOPT_FIRST = "optimise the VAE first, then add hooks or adapters, change layers or offload it"


def build(config: Mapping[str, Any], name: str = KL.name) -> Any:
    """A new VAE of the class of that name, from keyword arguments of its constructor, running on the engine.

    Missing keys take diffusers' defaults. Raises ValueError naming a key that the class does not have, or a value that
    no such class can be built from.
    """
    kind = CLASSES[family_named(name).name]
    unknown = set(config) - set(kind._get_init_keys(kind)) - {"_class_name", "_diffusers_version"}
    if unknown - {PADDING_KEY}:
        raise ValueError(f"{name} has no configuration key {', '.join(sorted(unknown))}")
    check_widths(config)
    vae = new_stock(name, config)
    set_padding_mode(vae, config.get(PADDING_KEY, "zeros"))
    return adopt(vae)


def adopt(vae: Any) -> Any:
    """Let `vae`, of any covered class, run on the engine, in place; returns `vae`.

    The parameters are the very same objects: dtype, device, gradients and optimizers that hold them stay as they
    are, and so do the state-dict keys. `enable_tiling()` and `enable_slicing()` stay callable; tiling gives the
    exact result, because images are not cut, whatever the tile sizes are set to, but where the engine steps aside (for
    hooks, adapters, gradients, a compiler): there the class cuts them, as it does without us.

    Raises TypeError, listing the covered classes, for another one, and ValueError for a VAE whose encoder or decoder
    was changed (an adapter was added, layers were replaced or set otherwise), since such a model is no longer the one
    its config describes, or has hooks on layers that would be replaced, which would be lost.
    """
    if family_of(vae).has_frames:
        _adopt_images(vae)
    elif theirs := [part for part in NETWORKS if not is_on_engine(getattr(vae, part))]:
        if not padding_modes(vae):  # diffusers hands on our key, and does not follow it
            set_padding_mode(vae, vae.config.get(PADDING_KEY, "zeros"))
        _replace_networks(vae, theirs, *_networks_for(vae), EQUAL_PROCESSORS, ADOPT_FIRST)
        _replace_methods(vae, _tiled_encode=_encode_whole, tiled_decode=_decode_whole)
    return vae


def optimize_vae(
    vae: Any, max_memory: int | float | str = "auto", check: bool = False, keep_packed: bool = True
) -> Any:
    """Run a VAE of any covered class on the engine, in place: same class, same keys, same numbers, faster.

    Without gradients it runs in strips of rows. On CPUs it takes native functions, which a thread compiles at the first
    use on a machine; until they are there, torch's run. `max_memory` bounds the bytes of a pass, with the encoder's or
    the decoder's weights and all that is prepared of them: a number, text such as "6GB" or "1.5 GiB", or "auto", half
    of what is free for what comes on top of the weights. Inner feature maps that do not fit are computed twice instead
    of kept, and a pass that does not fit even so raises ValueError with the bytes it needs. Qwen-Image's and Wan's
    classes run so on single images and first frames; clips of several frames run on the class's own code.

    `check` prints how far the results are from diffusers' own class, on a random picture of 256 x 256 (64 x 64 in a
    format that this machine emulates), and on CPUs in which form each convolution runs: Winograd's F(4x4, 3x3),
    F(2x2, 3x3) where that is not exact enough for the weight, or direct.

    On CPUs a fast convolution reads its weight in another order. What was made of the weights stays in memory beside
    them; with `keep_packed=False` each pass makes it anew, layer by layer, and nothing is held twice between calls.
    The VAE's own weights stay as they are either way: saving, copying and training see them.

    Returns `vae`, which `restore_vae` turns back; raises what `adopt` raises, and ValueError for a `max_memory` that
    is no size.
    """
    bound = parse_bytes(max_memory)
    adopt(vae)
    for holder in (vae.image_networks,) if family_of(vae).has_frames else (vae.encoder, vae.decoder):
        holder.engine = Engine(bound, compiled=True, keep_packed=keep_packed)
    for network in (vae.encoder, vae.decoder):
        forget(network)
    if vae.device.type == "cpu":
        library_if_built()  # from now on, where it must be compiled
    if check:
        print_differences(vae)
    return vae


def restore_vae(vae: Any) -> Any:
    """Undo `adopt` and `optimize_vae`: diffusers' own encoder and decoder on the same parameters, and its tiling.

    In place; returns `vae`. Raises TypeError, listing the covered classes, for another one, and ValueError, before
    anything is changed, where layers were replaced or set otherwise or have hooks, which would be lost.
    """
    family_of(vae)  # for its error
    for network in (vae.encoder, vae.decoder):
        forget(network)  # whoever still holds it, and with frames it stays the VAE's
    if ours := [part for part in NETWORKS if is_on_engine(getattr(vae, part))]:
        new, built = _networks_for(vae)
        processors = tuple(kind for kind in EQUAL_PROCESSORS if kind is not FusedAttnProcessor2_0)
        _replace_networks(vae, ours, built, new, processors, "undo that first, then restore the VAE")
    for name in ("_tiled_encode", "tiled_decode", "_encode", "_decode", "image_networks"):
        vae.__dict__.pop(name, None)
    return vae


class _OwnMethod:
    """A method in place of the class's, of this one object: without a reference to it that keeps it alive."""

    def __init__(self, function: Callable[..., Any], vae: Any) -> None:
        self.function, self.vae = function, weakref.ref(vae)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(self.vae(), *args, **options)

    def __getstate__(self) -> tuple[Callable[..., Any], Any]:
        """For copies and pickles: a copy belongs to the copied VAE."""
        return self.function, self.vae()

    def __setstate__(self, state: tuple[Callable[..., Any], Any]) -> None:
        self.__init__(*state)  # type: ignore[misc]


# ---- networks of ours in place of the class's


def _decoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What builds the decoder: FLUX.2's may have widths of its own."""
    return dict(config) | {
        "block_out_channels": config.get("decoder_block_out_channels") or config["block_out_channels"]
    }


def _networks_for(vae: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Encoder and decoder as its class builds them for this config, and ours: only the structure, without memory."""
    with torch.device("meta"):
        ours = {"encoder": EngineEncoder(vae.config), "decoder": EngineDecoder(_decoder_config(vae.config))}
        stock = new_stock(family_of(vae).name, vae.config)
    return {part: getattr(stock, part) for part in ours}, ours


def _replace_networks(
    vae: Any, parts: list[str], built: Any, new: Any, processors: tuple[type, ...], cure: str
) -> None:
    """Let `new` networks take over from those that the VAE has, which must be as those that were `built`."""
    for part in parts:
        require_as_built(getattr(vae, part), built[part], part, cure)
        take_over(new[part], getattr(vae, part), processors)
    for part in parts:
        setattr(vae, part, new[part])


def _replace_methods(vae: Any, **functions: Callable[..., Any]) -> None:
    """Let this VAE call ours in place of its class's methods; those that a derived class has of its own stay."""
    kind = CLASSES[family_of(vae).name]
    for name, function in functions.items():
        if getattr(type(vae), name) is getattr(kind, name):
            setattr(vae, name, _OwnMethod(function, vae))


def _engine_applies(network: nn.Module, x: Tensor) -> bool:
    return isinstance(network, EngineEncoder | EngineDecoder) and network.engine.applies(network, x)


def _encode_whole(vae: Any, x: Tensor) -> Tensor:
    """What diffusers would encode in tiles, and does where the engine steps aside: [B, C, H, W] -> [B, 2s, h, w]."""
    if not _engine_applies(vae.encoder, x):
        return cast(Tensor, type(vae)._tiled_encode(vae, x))
    moments: Tensor = vae.encoder(x)
    return moments if vae.quant_conv is None else vae.quant_conv(moments)


def _decode_whole(vae: Any, z: Tensor, return_dict: bool = True) -> Any:
    """What diffusers would decode in tiles, and does where the engine steps aside: [B, s, h, w] -> [B, C, H, W]."""
    if not _engine_applies(vae.decoder, z):
        return type(vae).tiled_decode(vae, z, return_dict=return_dict)
    image = vae.decoder(z if vae.post_quant_conv is None else vae.post_quant_conv(z))
    return DecoderOutput(sample=image) if return_dict else (image,)


# ---- single images past the class's networks


def _adopt_images(vae: Any) -> None:
    """Send single images through the two-dimensional layers; the class's modules stay where they are."""
    if "image_networks" in vae.__dict__:
        return
    with torch.device("meta"):
        stock = new_stock(family_of(vae).name, vae.config)
    for part in NETWORKS:
        require_parameters_of(getattr(stock, part), getattr(vae, part), ADOPT_FIRST)
    vae.image_networks = ImageNetworks(
        ImageEncoder(vae.encoder),
        ImageDecoder(vae.decoder),
        vae.quant_conv,
        vae.post_quant_conv,
        family_of(vae).patch(vae.config),
        frozenset(type(module) for module in stock.modules()),
    )
    _replace_methods(vae, _encode=_encode_frames, _decode=_decode_frames)


def _encode_frames(vae: Any, x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> the posterior's parameters [B, 2s, t, h, w]; clips by the class's own code."""
    networks = vae.image_networks
    if (
        x.shape[2] == 1
        and networks.are_those_of(vae)
        and (moments := networks.encode(x[:, :, 0])) is not None
    ):
        return moments[:, :, None]
    return cast(Tensor, type(vae)._encode(vae, x))


def _decode_frames(vae: Any, z: Tensor, return_dict: bool = True) -> Any:
    """[B, s, t, h, w] -> [B, C, T, H, W], clamped as the class does; clips by the class's own code."""
    networks = vae.image_networks
    is_image = z.shape[2] == 1 and networks.are_those_of(vae)
    if not is_image or (image := networks.decode(z[:, :, 0])) is None:
        return type(vae)._decode(vae, z, return_dict=return_dict)
    image = image.clamp(-1.0, 1.0)[:, :, None]
    return DecoderOutput(sample=image) if return_dict else (image,)
