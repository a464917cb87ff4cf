"""One .safetensors file -> AutoencoderKL, without a config: what the file does not say is read off its shapes.

Both spellings are understood: diffusers' keys, and those of the original latent-diffusion repositories (also with
the `first_stage_model.` or `vae.` prefix of a whole checkpoint), which diffusers' own converter renames.

Shapes: c latent channels.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from latentcodec.autoencoder import build

PREFIXES = ("first_stage_model.", "vae.")


def load_single_file(path: Path) -> AutoencoderKL:
    """The AutoencoderKL in `path`. A `config.json` beside the file is used if there is one.

    Otherwise widths, layers, channels and optional layers are read off the shapes; what shapes do not tell
    (norm_num_groups 32 or, for narrow models, 8; scaling factor 0.18215 for 4 channels without a config) takes the
    values of the public checkpoints. Raises ValueError naming the file if it is no safetensors file or no VAE.
    """
    state = _read(path)
    sibling = path.parent / "config.json"
    config = json.loads(sibling.read_text()) if sibling.is_file() else None
    if "encoder.down.0.block.0.conv1.weight" in state:
        config = config or _config_from_ldm(state)
        state = convert_ldm_vae_checkpoint(state, config)
    elif "encoder.down_blocks.0.resnets.0.conv1.weight" not in state:
        raise ValueError(
            f"{path} holds no AutoencoderKL: no key of its encoder is among its {len(state)} tensors"
        )
    vae = build(config or _config_from_diffusers(state))
    try:
        vae.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the AutoencoderKL it seems to hold: {error}") from None
    return vae.to(next(iter(state.values())).dtype)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; pickled weights are not loaded, they can run code"
        )
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in keys):
            return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def _config_from_diffusers(state: dict[str, Tensor]) -> dict[str, Any]:
    stages = _count(state, r"encoder\.down_blocks\.(\d+)\.")
    return _config(
        state,
        widths=[state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(stages)],
        layers=_count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        attention=[f"encoder.down_blocks.{i}.attentions.0.to_q.weight" in state for i in range(stages)],
        middle="encoder.mid_block.attentions.0.to_q.weight" in state,
    )


def _config_from_ldm(state: dict[str, Tensor]) -> dict[str, Any]:
    stages = _count(state, r"encoder\.down\.(\d+)\.")
    return _config(
        state,
        widths=[state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(stages)],
        layers=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        attention=[f"encoder.down.{i}.attn.0.q.weight" in state for i in range(stages)],
        middle="encoder.mid.attn_1.q.weight" in state,
    )


def _config(
    state: dict[str, Tensor], widths: list[int], layers: int, attention: list[bool], middle: bool
) -> dict[str, Any]:
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)],
        "layers_per_block": layers,
        "norm_num_groups": 32 if all(width % 32 == 0 and width >= 128 for width in widths) else 8,
        "mid_block_add_attention": middle,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
    }


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """How many different numbers stand at the group of `pattern` among the keys."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})
