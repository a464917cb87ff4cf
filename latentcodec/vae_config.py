"""What a config.json may say of a VAE of a covered class, checked before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from latentcodec.adopt import build
from latentcodec.stock import CLASSES
from latentcodec.vae.families import FAMILIES, KL, family_named
from latentcodec.vae.networks import DOWN_BLOCKS, UP_BLOCKS
from latentcodec.vae.padding import PADDING_KEY


def class_named_in(config: Mapping[str, Any], origin: str) -> str:
    """The covered class that a config.json describes. Raises ValueError naming `origin` for another one."""
    name = config.get("_class_name") or KL.name
    if not isinstance(name, str):
        raise ValueError(f"{origin}: _class_name cannot be {name!r}")
    try:
        return family_named(name).name
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def check_config(config: Any, origin: str) -> dict[str, Any]:
    """What the constructor of a covered class takes, out of the content of a config.json.

    Raises ValueError naming `origin` and the key if the configuration is another model's or has a value that no
    such class can have.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{origin} is not a JSON object")
    name = class_named_in(config, origin)
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    hints = get_type_hints(CLASSES[name].__init__) | {"sample_size": int | tuple[int], PADDING_KEY: str}
    for key, value in arguments.items():
        if key not in hints:
            raise ValueError(f"{origin}: {name} has no configuration key {key!r}")
        if not _fits(value, hints[key]):
            raise ValueError(f"{origin}: {key} cannot be {value!r}")
    if arguments.get("scaling_factor") == 0:
        raise ValueError(f"{origin}: scaling_factor cannot be 0")
    if min(arguments.get("latents_std") or [1.0]) <= 0:
        raise ValueError(f"{origin}: latents_std cannot hold {min(arguments['latents_std'])!r}")
    _check_lengths(arguments, name, origin)
    for key, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        for block in arguments.get(key, ()):
            if block not in known:
                raise ValueError(f"{origin}: {key} cannot hold {block!r}, only {' and '.join(known)}")
    try:
        with torch.device("meta"):  # all that a constructor can refuse, without the weights
            build(arguments, name)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{origin}: {error}") from None
    return arguments


def _check_lengths(arguments: Mapping[str, Any], name: str, origin: str) -> None:
    """Lists with an entry for each width, or each latent channel, must have as many."""
    widths = len(arguments.get("block_out_channels", ()))
    channels = arguments.get(FAMILIES[name].raw_key)
    for key, length, entries in (
        ("down_block_types", widths, "widths"),
        ("up_block_types", widths, "widths"),
        ("decoder_block_out_channels", widths, "widths"),
        ("temperal_downsample", len(arguments.get("dim_mult", ())) - 1, "steps between widths"),
        ("latents_mean", channels, "latent channels"),
        ("latents_std", channels, "latent channels"),
    ):
        if arguments.get(key) is not None and len(arguments[key]) != length:
            raise ValueError(f"{origin}: {key} has {len(arguments[key])} entries for {length} {entries}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is what the annotation of a constructor argument asks for."""
    if get_origin(hint) is UnionType:
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list | tuple) and all(_fits(part, get_args(hint)[0]) for part in value)
    if get_origin(hint) is tuple:  # diffusers writes tuple[int] for any number of them
        item = get_args(hint)[0]
        return isinstance(value, list | tuple) and len(value) > 0 and all(_fits(part, item) for part in value)
    if hint is int:  # counts, all of them
        return type(value) is int and value > 0
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, hint)
