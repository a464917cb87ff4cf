"""One .safetensors file -> AutoencoderKL. What no config.json beside the file says is read off the shapes.

Three spellings are understood: diffusers' keys, its former names of the attention layers, and the keys of the
original latent-diffusion repositories, which diffusers' own converter renames; the last also within a whole
checkpoint. Where neither shapes nor neighbours tell (how the latents are scaled, how many groups the norms have), the
file is refused: a wrong guess would load and give wrong numbers. One guess is made, as diffusers makes it: latents of
4 channels without neighbours are scaled as Stable Diffusion's, which for SDXL's VAE in a file of its own is wrong; put
its config.json beside it.

Shapes: c latent channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentcodec.adopt import build
from latentcodec.model_folder import check_numbers, read_json
from latentcodec.vae.networks import DOWN_BLOCKS, UP_BLOCKS

PREFIXES = ("", "first_stage_model.", "vae.")  # of the VAE's keys: alone, or within a whole checkpoint
LDM_KEY = "encoder.down.0.block.0.conv1.weight"
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # a trained LDM also holds its loss
DIFFUSERS_KEY = "encoder.down_blocks.0.resnets.0.conv1.weight"

# What early diffusers called the layers of the attention; many published files still have these names.
FORMER_NAME = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.")
PRESENT_NAME = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# What a whole checkpoint holds beside its VAE tells how the latents are scaled and shifted; the numbers are those of
# the public configurations of SDXL, SD3 and FLUX.1.
NEIGHBOURS = {
    "conditioner.embedders.1.": {"scaling_factor": 0.13025},
    "model.diffusion_model.joint_blocks.": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "model.diffusion_model.double_blocks.": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
}
STABLE_DIFFUSION = {"scaling_factor": 0.18215}  # 4 channels and no such neighbour, as diffusers assumes too


def load_single_file(path: Path) -> AutoencoderKL:
    """The AutoencoderKL in `path`, float32. A `config.json` beside the file is used if it describes one.

    Otherwise widths, layers, channels and optional layers are read off the shapes, and the scaling factor is that of
    the public checkpoint which the file looks like. One that holds nothing but a VAE of 4 latent channels is taken for
    Stable Diffusion's (0.18215); SDXL's has the same shapes and 0.13025, so it needs its config.json. Raises
    ValueError naming the file if it cannot be read, holds no AutoencoderKL or leaves open what it needs to be told by
    a config.json.
    """
    state, keys = _read(path)
    config = _config_beside(path)
    try:
        if LDM_KEY in state:
            config = config or _config_from_ldm(state, keys)
            state = _converted(state, config)
        else:
            state = {_present_name(key): value for key, value in state.items()}
            config = config or _config_from_diffusers(state, keys)
        vae = build(config)
    except KeyError as error:
        raise ValueError(f"{path} holds only a part of an AutoencoderKL: {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _require_equal_shapes(path, dict(vae.state_dict()), state)
    vae.load_state_dict(state)
    return vae


def check_config(config: Any, origin: str) -> dict[str, Any]:
    """What the constructor of AutoencoderKL takes, out of the content of a config.json.

    Raises ValueError naming `origin` and the key if the configuration is another model's or has a value that no
    AutoencoderKL can have.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{origin} is not a JSON object")
    if (name := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise ValueError(f"{origin} describes the class {name}, not an AutoencoderKL")
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    hints = get_type_hints(AutoencoderKL.__init__) | {"sample_size": int | tuple[int]}
    for key, value in arguments.items():
        if key not in hints:
            raise ValueError(f"{origin}: AutoencoderKL has no configuration key {key!r}")
        if not _fits(value, hints[key]):
            raise ValueError(f"{origin}: {key} cannot be {value!r}")
    if arguments.get("scaling_factor") == 0:
        raise ValueError(f"{origin}: scaling_factor cannot be 0")
    widths = len(arguments.get("block_out_channels", ()))
    channels = arguments.get("latent_channels")
    for key, length, entries in (
        ("down_block_types", widths, "widths"),
        ("up_block_types", widths, "widths"),
        ("latents_mean", channels, "latent channels"),
        ("latents_std", channels, "latent channels"),
    ):
        if arguments.get(key) is not None and len(arguments[key]) != length:
            raise ValueError(f"{origin}: {key} has {len(arguments[key])} entries for {length} {entries}")
    for key, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        for block in arguments.get(key, ()):
            if block not in known:
                raise ValueError(f"{origin}: {key} cannot hold {block!r}, only {' and '.join(known)}")
    try:
        with torch.device("meta"):  # all that a constructor can refuse, without the weights
            build(arguments)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    return arguments


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is what the annotation of a constructor argument asks for."""
    if get_origin(hint) is UnionType:
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:  # diffusers writes tuple[int] for any number of them
        item = get_args(hint)[0]
        return isinstance(value, list | tuple) and len(value) > 0 and all(_fits(part, item) for part in value)
    if hint is int:  # counts, all of them
        return type(value) is int and value > 0
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, hint)


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the VAE without their prefix, and the keys of all tensors in the file."""
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; pickled weights are not loaded, they can run code"
        )
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            for prefix in PREFIXES:
                if prefix + LDM_KEY in keys or prefix + DIFFUSERS_KEY in keys:
                    ours = [key for key in keys if key.startswith(prefix)]
                    return {key.removeprefix(prefix): file.get_tensor(key) for key in ours}, keys
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    raise ValueError(f"{path} holds no AutoencoderKL: none of its {len(keys)} tensors is of its encoder")


def _config_beside(path: Path) -> dict[str, Any] | None:
    """The config.json in the folder of `path`; None if there is none, or one of another kind of model."""
    file = path.parent / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    if not isinstance(config, dict) or config.get("_class_name") != "AutoencoderKL":
        return None  # folders of downloads hold the config.json of whatever was downloaded last
    check_numbers(config, str(file))
    return check_config(config, str(file))


def _present_name(key: str) -> str:
    """The key as diffusers spells it today."""
    return FORMER_NAME.sub(lambda match: f"{match[1]}{PRESENT_NAME[match[2]]}.", key)


def _converted(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """LDM's keys to diffusers' by its own converter, which drops what it does not know: here that is refused."""
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(state, config)
    given = [key for key in state if key.startswith(PARTS)]
    if len(converted) != len(given):
        raise ValueError(f"diffusers can convert only {len(converted)} of its {len(given)} tensors")
    return converted


def _require_equal_shapes(path: Path, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    shapes, found = ({key: list(value.shape) for key, value in part.items()} for part in (expected, state))
    differing = [key for key in sorted(shapes.keys() | found.keys()) if shapes.get(key) != found.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{path} does not fit its configuration: {len(differing)} of {len(shapes)} tensors differ, the first is "
            f"{key!r}: expected {shapes.get(key, 'none')}, found {found.get(key, 'none')}"
        )


def _config_from_diffusers(state: Mapping[str, Tensor], keys: list[str]) -> dict[str, Any]:
    stages = _count(state, r"encoder\.down_blocks\.(\d+)\.")
    return _config(
        state,
        keys,
        widths=[state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(stages)],
        layers=_count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        attention=[f"encoder.down_blocks.{i}.attentions.0.to_q.weight" in state for i in range(stages)],
        middle="encoder.mid_block.attentions.0.to_q.weight" in state,
    )


def _config_from_ldm(state: Mapping[str, Tensor], keys: list[str]) -> dict[str, Any]:
    stages = _count(state, r"encoder\.down\.(\d+)\.")
    return _config(
        state,
        keys,
        widths=[state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(stages)],
        layers=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        attention=[f"encoder.down.{i}.attn.0.q.weight" in state for i in range(stages)],
        middle="encoder.mid.attn_1.q.weight" in state,
    )


def _config(
    state: Mapping[str, Tensor],
    keys: list[str],
    widths: list[int],
    layers: int,
    attention: list[bool],
    middle: bool,
) -> dict[str, Any]:
    latent_channels = state["decoder.conv_in.weight"].shape[1]
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": latent_channels,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)],
        "layers_per_block": layers,
        "norm_num_groups": _norm_num_groups(widths),
        "mid_block_add_attention": middle,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        **_scale(latent_channels, keys),
    }


def _norm_num_groups(widths: list[int]) -> int:
    if any(width < 128 or width % 32 for width in widths):
        raise ValueError(
            f"the weights do not tell norm_num_groups for widths {widths}; put the model's config.json beside the file"
        )
    return 32


def _scale(latent_channels: int, keys: list[str]) -> dict[str, float]:
    for neighbour, scale in NEIGHBOURS.items():
        if any(key.startswith(neighbour) for key in keys):
            return scale
    if latent_channels != 4:
        raise ValueError(
            f"the weights do not tell how these {latent_channels} latent channels are scaled; put the model's "
            "config.json beside the file"
        )
    return STABLE_DIFFUSION


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers stand at the group of `pattern` among the keys."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})
