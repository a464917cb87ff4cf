"""One .safetensors file -> a VAE of a covered class. What no config.json beside the file says is read off the shapes.

Four spellings are understood: diffusers' keys, its former names of the attention layers, and the keys of the original
repositories, which diffusers' own converters rename: of latent diffusion and FLUX.2, also within a whole checkpoint,
and of Wan 2.1, which ComfyUI's file of Qwen-Image's VAE has too. Where neither shapes nor neighbours tell (how the
latents are scaled, how many groups the norms have), the file is refused: a wrong guess would load and give wrong
numbers. One guess is made, as diffusers makes it: latents of 4 channels without neighbours are scaled as Stable
Diffusion's, which for SDXL's VAE in a file of its own is wrong; put its config.json beside it.

Shapes: c latent channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_wan_vae_to_diffusers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentcodec.adopt import build
from latentcodec.model_folder import check_numbers, read_json, refuse_quantised
from latentcodec.vae.families import FAMILIES, FLUX2, KL, WAN, covered
from latentcodec.vae_config import check_config, class_named_in

PREFIXES = ("", "first_stage_model.", "vae.")  # of the VAE's keys: alone, or within a whole checkpoint
LDM_KEY = "encoder.down.0.block.0.conv1.weight"
PARTS = (
    "encoder.",
    "decoder.",
    "quant_conv.",
    "post_quant_conv.",
    "bn.",
)  # a trained LDM also holds its loss
DIFFUSERS_KEY = "encoder.down_blocks.0.resnets.0.conv1.weight"
WAN_KEY = "encoder.downsamples.0.residual.2.weight"
WAN_DIFFUSERS_KEY = "encoder.down_blocks.0.conv1.weight"
WAN_22_KEY = "encoder.downsamples.0.downsamples.0.residual.2.weight"  # stages within stages
WAN_22_NORM = "encoder.norm_out.gamma"  # which diffusers' class has in both layouts
FIRST_KEYS = (LDM_KEY, DIFFUSERS_KEY, WAN_KEY, WAN_DIFFUSERS_KEY)
BATCH_NORM = "bn.running_mean"  # that only FLUX.2's class has

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
WAN_LATENT_CHANNELS = 16  # of Wan 2.1 and Qwen-Image, whose numbers are the defaults of their classes
STABLE_DIFFUSION = {"scaling_factor": 0.18215}  # 4 channels and no such neighbour, as diffusers assumes too


def load_single_file(path: Path) -> Any:
    """The VAE in `path`, float32. A `config.json` beside the file is used if it describes a covered class.

    Otherwise the class, widths, layers, channels and optional layers are read off keys and shapes, and the scaling
    factor is that of the public checkpoint which the file looks like. One that holds nothing but a VAE of 4 latent
    channels is taken for Stable Diffusion's (0.18215); SDXL's has the same shapes and 0.13025, so it needs its
    config.json. Wan 2.1's VAE and Qwen-Image's have the same layers and numbers: without a config.json it is Wan's
    class. Raises ValueError naming the file if it cannot be read, holds no covered VAE or leaves open what it needs to
    be told by a config.json.
    """
    state, keys = _read(path)
    refuse_quantised({key: str(value.dtype) for key, value in state.items() if key.startswith(PARTS)}, path)
    config = _config_beside(path)
    try:
        name, state, config = _described(state, keys, config)
        vae = build(config, name)
    except KeyError as error:
        raise ValueError(f"{path} holds only a part of a VAE: {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    counters = {key: value for key, value in vae.state_dict().items() if not value.is_floating_point()}
    state = counters | state
    _require_equal_shapes(path, dict(vae.state_dict()), state)
    vae.load_state_dict(state)
    return vae


def _described(
    state: dict[str, Tensor], keys: list[str], config: dict[str, Any] | None
) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The class, the tensors under diffusers' keys, and the arguments of the constructor."""
    given = None if config is None else class_named_in(config, "config.json")
    arguments = None if config is None else {key: v for key, v in config.items() if not key.startswith("_")}
    if WAN_KEY in state or WAN_DIFFUSERS_KEY in state:
        state = convert_wan_vae_to_diffusers(state) if WAN_KEY in state else state
        return given or WAN.name, state, arguments or config_of_wan(state)
    if LDM_KEY in state:
        state = {_without_part(key): value for key, value in state.items()}
        arguments = arguments or _config_from_ldm(state, keys)
        state = _converted(state, arguments)
    else:
        if arguments is None and WAN_22_NORM in state:
            raise ValueError(
                "these weights, such as Wan 2.2's, do not tell how their latents are scaled; put the "
                "model's config.json beside the file"
            )
        state = {_present_name(key): value for key, value in state.items()}
        arguments = arguments or _config_from_diffusers(state, keys)
    return given or (FLUX2.name if BATCH_NORM in state else KL.name), state, arguments


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
                if any(prefix + key in keys for key in FIRST_KEYS):
                    ours = [key for key in keys if key.startswith(prefix)]
                    return {key.removeprefix(prefix): file.get_tensor(key) for key in ours}, keys
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    if any(key.endswith(WAN_22_KEY) for key in keys):
        raise ValueError(
            f"{path} holds Wan 2.2's VAE under its original keys, which are not read: give diffusers' copy of it, the "
            "folder vae of Wan-AI/Wan2.2-TI2V-5B-Diffusers"
        )
    raise ValueError(
        f"{path} holds no VAE of a covered class ({covered()}): none of its {len(keys)} tensors is of its encoder"
    )


def _config_beside(path: Path) -> dict[str, Any] | None:
    """The config.json in the folder of `path`; None if there is none, or one of another kind of model."""
    file = path.parent / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    if not isinstance(config, dict) or config.get("_class_name") not in FAMILIES:
        return None  # folders of downloads hold the config.json of whatever was downloaded last
    check_numbers(config, str(file))
    return {"_class_name": config["_class_name"], **check_config(config, str(file))}


def _present_name(key: str) -> str:
    """The key as diffusers spells it today."""
    return FORMER_NAME.sub(lambda match: f"{match[1]}{PRESENT_NAME[match[2]]}.", key)


def _without_part(key: str) -> str:
    """The key of a 1x1 convolution around the latent, which FLUX.2's file counts to encoder and decoder."""
    for part in ("encoder.quant_conv.", "decoder.post_quant_conv."):
        if key.startswith(part):
            return key.partition(".")[2]
    return key


def _converted(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """LDM's keys to diffusers' by its own converter, which drops what it does not know: here that is refused."""
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(state, config)
    converted |= {key: value for key, value in state.items() if key.startswith("bn.")}  # FLUX.2's
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
        **(_decoder_widths(state, len(widths)) if BATCH_NORM in state else _scale(latent_channels, keys)),
    }


def _decoder_widths(state: Mapping[str, Tensor], stages: int) -> dict[str, Any]:
    """FLUX.2's decoder may have widths of its own; its numbers are those of the batch norm."""
    if "decoder.up.0.block.0.conv1.weight" in state:
        names = [f"decoder.up.{i}.block.0.conv1.weight" for i in range(stages)]
    else:
        names = [f"decoder.up_blocks.{stages - 1 - i}.resnets.0.conv1.weight" for i in range(stages)]
    return {"decoder_block_out_channels": [state[name].shape[0] for name in names]}


def config_of_wan(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of Wan 2.1's class, for weights under diffusers' keys. The latents' numbers are the class's own."""
    blocks = _count(state, r"encoder\.down_blocks\.(\d+)\.")
    resampled = [f"encoder.down_blocks.{i}.resample.1.weight" in state for i in range(blocks)]
    base, channels = (
        state[f"encoder.conv_in.{part}"].shape[axis] for part, axis in (("bias", 0), ("weight", 1))
    )
    layers = resampled.index(True)
    last = [i for i in range(blocks) if i + 1 == blocks or resampled[i + 1]]  # residual block of each stage
    widths = [state[f"encoder.down_blocks.{i}.conv2.weight"].shape[0] for i in last]
    latent = state["post_quant_conv.weight"].shape[0]
    if latent != WAN_LATENT_CHANNELS:
        raise ValueError(
            f"the weights do not tell how these {latent} latent channels are scaled; put the model's config.json "
            "beside the file"
        )
    return {
        "base_dim": base,
        "decoder_base_dim": state["decoder.norm_out.gamma"].shape[0] * base // widths[0],
        "z_dim": latent,
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": layers,
        "temperal_downsample": [
            f"encoder.down_blocks.{i}.time_conv.weight" in state for i in range(blocks) if resampled[i]
        ],
        "in_channels": channels,
        "out_channels": state["decoder.conv_out.weight"].shape[0],
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
