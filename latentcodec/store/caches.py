"""Files of latents that other programs have cached: .npz files of kohya's sd-scripts, .pt files of SimpleTuner.

Such caches do not say which codec made them, nor whether their numbers are normalised; whoever imports them says it.

    kohya        NAME_0512x0768_sdxl.npz: `latents` (or `latents_64x96`) [c, h, w], `original_size`, `crop_ltrb`,
                 `latents_flipped`. Raw for SD and SDXL, normalised for SD3 and FLUX.
    SimpleTuner  NAME.pt: a tensor [c, h, w], or a dictionary with `latents`. Normalised.

Shapes: B batch, c latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latentcodec.files import open_regular, require_regular
from latentcodec.pixels import UnreadableImage
from latentcodec.pixels.folders import require_folder

BROKEN = (  # what numpy, torch, pickle and zipfile raise for damaged, hostile and other files
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError),
    *(ValueError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, SafetensorError),
)
SUFFIXES = (".npz", ".pt", ".safetensors", ".npy")


class Cached(NamedTuple):
    """One file of a cache."""

    latent: Tensor
    """[c, h, w] float32, as in the file."""
    original: tuple[int, int] | None
    """H, W of the picture, where the file says so."""
    crop: tuple[int, int]
    """Top and left."""


def find_caches(folder: Path) -> list[Path]:
    """The cache files below a folder, sorted. Raises ValueError where there is none, or no folder."""
    require_folder(folder)
    found = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{folder}: holds no {', '.join(SUFFIXES)} file")
    return found


def read_cache(path: str | Path) -> Cached:
    """Reads one file of a cache. Raises UnreadableImage (a ValueError) naming it and the reason.

    .pt files are read without running code that they may hold.
    """
    try:
        content = _content(Path(path))
        latent: Tensor = content["latents"]
        original, crop = content.get("original_size"), content.get("crop_ltrb")
        if latent.ndim == 4 and len(latent) == 1:
            latent = latent[0]
        size = (
            None if original is None else (int(original[1]), int(original[0]))
        )  # kohya writes width, height
        place = (0, 0) if crop is None else (int(crop[1]), int(crop[0]))
    except BROKEN as error:
        raise UnreadableImage(f"{path}: cannot be read ({_reason(error)})") from error
    if latent.ndim != 3 or not latent.numel() or not latent.isfinite().all():
        raise UnreadableImage(f"{path}: no finite latent [c, h, w], but {list(latent.shape)}")
    return Cached(latent, size, place)


def read_latents(path: Path) -> Tensor:
    """[c, h, w] or [B, c, h, w] float32 of a .safetensors, .npy, .npz or .pt file. Raises ValueError naming it."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: latents are read from {', '.join(SUFFIXES)} files, or from the folder of a store"
        )
    try:
        latents: Tensor = _content(path)["latents"]
    except BROKEN as error:
        raise ValueError(f"{path}: cannot be read ({_reason(error)})") from error
    if latents.ndim not in (3, 4) or not latents.numel() or not latents.isfinite().all():
        raise ValueError(f"{path}: no finite latents [c, h, w] or [B, c, h, w], but {list(latents.shape)}")
    return latents


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _content(path: Path) -> dict[str, Any]:
    """What `_stored` finds, its latents in float32."""
    content = _stored(path)
    if not content["latents"].is_floating_point():
        raise ValueError(f"its latents are {content['latents'].dtype}, and floating-point numbers are needed")
    return {**content, "latents": content["latents"].float()}


def _stored(path: Path) -> dict[str, Any]:
    """The `latents` of a file, and what else it says."""
    require_regular(path)
    if path.suffix == ".npz":
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            content: dict[str, Any] = {name: arrays[name] for name in arrays.files}
        named = [name for name in content if name == "latents" or re.fullmatch(r"latents_\d+x\d+", name)]
        if not named:
            raise KeyError(f"no array 'latents' among {', '.join(content)}")
        suffix = named[0].removeprefix("latents")  # newer files: latents_64x96, original_size_64x96
        return {
            "latents": torch.from_numpy(content[named[0]]),
            "original_size": content.get(f"original_size{suffix}"),
            "crop_ltrb": content.get(f"crop_ltrb{suffix}"),
        }
    if path.suffix == ".npy":
        with open_regular(path) as file:
            return {"latents": torch.from_numpy(np.load(file, allow_pickle=False))}
    if path.suffix == ".safetensors":
        loaded: Any = load_file(path)
    else:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, Tensor):
        return {"latents": loaded}
    name = next((name for name in ("latents", "latent") if name in loaded), None)
    if name is None or not isinstance(loaded[name], Tensor):
        raise KeyError(f"no tensor 'latents' among {', '.join(map(str, loaded))}")
    return {"latents": loaded[name]}
