"""What is looked at in a model's folder before a library reads it: its JSON, its index, how large it claims to be.

diffusers meets broken, hostile or doubtful files with tracebacks, hours of building, pickled weights or silence.

Shapes: c latent channels.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from latentcodec.files import read_regular

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
VARIANT = re.compile(
    r"diffusion_pytorch_model(?:\.safetensors\.index)?\.(\w+?)(?:-\d+-of-\d+)?\.(?:safetensors|json)"
)
COUNTER = "num_batches_tracked"  # of a batch norm, the only whole number among weights
FLOATING = re.compile(r"(torch\.b?float|B?F)\d")  # as torch and safetensors write types
LARGEST_JSON = 10_000_000  # bytes; an index of a thousand shards has fewer
LARGEST_NUMBER = 2**20  # of any count or width in a configuration
LARGEST_DEPTH = 1000  # layers of a stage, stages


def check_folder(folder: Path) -> None:
    """Raises `ValueError` naming the file and the key that no VAE can have, before anything of it is built."""
    config = read_json(folder / CONFIG)
    check_numbers(config, str(folder / CONFIG))
    shards = {name for index in folder.glob("*.index*.json") for name in _check_index(folder, index)}
    alone = [WEIGHTS] if (folder / WEIGHTS).is_file() else []
    variants = (
        []
        if alone or shards
        else [file.name for file in folder.glob("diffusion_pytorch_model.*.safetensors") if file.is_file()]
    )
    for name in [*alone, *variants, *sorted(shards)]:
        check_dtypes(folder / name)


def check_dtypes(file: Path) -> None:
    """Raises `ValueError` for weights of a quantised model; a file that cannot be read is left to whoever loads it."""
    try:
        with safe_open(file, framework="pt") as content:
            kinds = {key: content.get_slice(key).get_dtype() for key in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return
    refuse_quantised(kinds, file)


def refuse_quantised(kinds: Mapping[str, str], file: Path) -> None:
    """Raises `ValueError` for a weight that is no floating-point number: its codes would be taken for its values."""
    for key, kind in kinds.items():
        if not FLOATING.match(kind) and not key.endswith(COUNTER):
            raise ValueError(
                f"{file}: {key} is of type {kind}, as in a quantised model; only floating-point weights are read: save "
                "the model in float32 or a half precision"
            )


def read_json(file: Path) -> Any:
    """What a JSON file says; raises `ValueError` naming it where that is nothing, or too much."""
    try:
        content = read_regular(file)
        if len(content) > LARGEST_JSON:
            raise ValueError(f"{len(content):,} bytes, more than {LARGEST_JSON:,}")
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        )
        raise ValueError(f"{file} is not a valid JSON file: {reason}") from error


def check_numbers(config: Any, origin: str) -> None:
    """Refuse sizes that would be built for hours, and normalisations that divide by nothing."""
    if not isinstance(config, dict):
        raise ValueError(f"{origin} is not a JSON object")
    for key, value in _numbers(config):
        largest = LARGEST_DEPTH if "layers" in key or "num_res" in key else LARGEST_NUMBER
        if not math.isfinite(value) or (isinstance(value, int) and abs(value) > largest):
            shown = f"a number of {len(str(value))} digits" if isinstance(value, int) else value
            raise ValueError(f"{origin}: {key} cannot be {shown}")
    for key, value in config.items():
        if isinstance(value, list) and len(value) > LARGEST_DEPTH:
            raise ValueError(f"{origin}: {key} cannot have {len(value):,} entries")
    std = config.get("latents_std")
    if isinstance(std, list) and not all(isinstance(s, int | float) and s > 0 for s in std):
        raise ValueError(f"{origin}: latents_std must be positive numbers, not {std}")


def variant_of(folder: Path) -> str | None:
    """The name of the only variant of the weights in a folder that has none without a name, such as fp16.

    Raises `ValueError` naming the files where there are several.
    """
    return only_variant([file.name for file in folder.iterdir() if file.is_file()], str(folder))


def only_variant(names: Iterable[str], place: str) -> str | None:
    """The same of a folder's file names, wherever the folder is."""
    names = set(names)
    if WEIGHTS in names or f"{WEIGHTS}.index.json" in names:
        return None
    # diffusion_pytorch_model.fp16.safetensors, or its index and its parts: ...fp16-00001-of-00002.safetensors
    found = {match[1] for name in names if (match := VARIANT.fullmatch(name))}
    if len(found) > 1:
        files = ", ".join(f"{place}/{name}" for name in sorted(names) if VARIANT.fullmatch(name))
        raise ValueError(f"{place} holds weights of several variants; give the path of one of them: {files}")
    return found.pop() if found else None


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in a configuration, with the key that it belongs to."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _check_index(folder: Path, index: Path) -> set[str]:
    """The files that an index of weights names: safetensors in this folder, all of them there."""
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} is no index of weights: it needs a weight_map from tensors to files")
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names {name}, which is no .safetensors file of this folder; pickled weights are not loaded, "
                "they can run code"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is not there")
    return set(shards.values())
