"""The bench scripts as modules for their tests, small codecs to give them, and what is read off their results."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from latentcodec.adopt import build
from latentcodec.codec import LatentCodec
from latentcodec.pixels import save_image

BENCH = Path(__file__).parents[2] / "bench"
CONFIG = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "mid_block_add_attention": False,
}


def script(name: str) -> ModuleType:
    """A bench script as a module: bench/ is not a package."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def save_white(place: Path, side: int = 32) -> tuple[str, str]:
    """A codec whose every picture is white, and a folder of white pictures, which come back unchanged."""
    vae = build(CONFIG)
    with torch.no_grad():
        vae.decoder.conv_out.weight.zero_()
        vae.decoder.conv_out.bias.fill_(2)
    LatentCodec(vae).save_pretrained(place / "white")
    for i in range(2):
        save_image(torch.ones(3, side, side + i), place / "images" / f"{i}.png")
    return str(place / "white"), str(place / "images")


def last_line(text: str) -> dict:
    """Strict JSON: NaN and Infinity are refused."""
    return json.loads(text.strip().splitlines()[-1], parse_constant=lambda name: pytest.fail(name))


def references(page: str) -> list[str]:
    """Everything in a page that a browser would fetch by itself; its own script is looked at in the browser test."""
    page = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    page = re.sub(r'<a href="[\w.-]+">', "", page)  # to files beside it, followed when they are clicked
    found = re.findall(r"""(?:src|href|action|data|poster|srcset)\s*=\s*["']?([^"'\s>]+)""", page)
    found += re.findall(r"url\(\s*[\"']?([^\"')]+)", page) + re.findall(r"@import\s+(\S+)", page)
    return [target for target in found if not target.startswith(("#", "data:"))]
