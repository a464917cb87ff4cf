"""How the convolutions of a VAE pad: the mode of each, and the one that a configuration names for all.

diffusers' classes pad with zeros, and no key of theirs says otherwise. Newer VAEs repeat or mirror the border, which
leaves bright borders alone; textures without seams pad in a circle. A codec that is trained so has a key of ours in
its config.json, which diffusers hands on and does not follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from latentcodec.vae.families import family_of

PADDING_KEY = "latentcodec_padding_mode"
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def padded_convolutions(vae: Any) -> Iterator[tuple[str, nn.Conv2d]]:
    """Those that pad by themselves, by their names; not the ones before which a map is padded with zeros."""
    for name, layer in vae.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.padding not in ((0, 0), "valid"):
            yield name, layer


def padding_modes(vae: Any) -> dict[str, str]:
    """The modes other than zeros, by the names of their convolutions."""
    return {
        name: layer.padding_mode for name, layer in padded_convolutions(vae) if layer.padding_mode != "zeros"
    }


def padding_mode(vae: Any) -> str:
    """The mode of all convolutions. Raises ValueError where they have several, which no configuration can hold."""
    modes = {layer.padding_mode for _, layer in padded_convolutions(vae)}
    if len(modes) > 1:
        raise ValueError(
            f"convolutions of this VAE pad by several modes ({', '.join(sorted(modes))}), and its configuration can "
            "hold one: set padding_mode alike on all of them"
        )
    return modes.pop() if modes else "zeros"


def set_padding_mode(vae: Any, mode: str) -> None:
    """Let all convolutions pad by `mode`, and the configuration say so.

    Raises ValueError for an unknown mode, and for classes that pad before their convolutions, always with zeros.
    """
    if mode not in PADDING_MODES:
        raise ValueError(f"{PADDING_KEY} cannot be {mode!r}; choose one of {', '.join(PADDING_MODES)}")
    if mode != "zeros" and (family := family_of(vae)).has_frames:
        raise ValueError(f"{PADDING_KEY} cannot be {mode!r}: the layers of {family.name} pad with zeros only")
    for _, layer in padded_convolutions(vae):
        layer.padding_mode = mode  # type: ignore[assignment]
    if mode != vae.config.get(PADDING_KEY, "zeros"):
        vae.register_to_config(**{PADDING_KEY: mode})
