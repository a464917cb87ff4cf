"""How many bytes a pass may take: what the user said, and what is free."""

from __future__ import annotations

import math
import re

import psutil
import torch

from latentcodec.control_groups import free_memories

UNITS = {"": 1, "b": 1}
UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}
SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: int | float | str) -> int | None:
    """Bytes as a number, or as text such as "6GB" (10^9) or "1.5 GiB" (2^30); None for "auto".

    Raises ValueError, naming max_memory and the value, for anything else.
    """
    if isinstance(value, str):
        if value.strip().lower() == "auto":
            return None
        found = SIZE.fullmatch(value)
        if found and found[2].lower() in UNITS:
            return _whole(float(found[1]) * UNITS[found[2].lower()], value)
    elif not isinstance(value, bool) and isinstance(value, int | float):
        return _whole(value, value)
    raise ValueError(_expected(value))


def _whole(number: float, given: object) -> int:
    if not math.isfinite(number) or number < 1:
        raise ValueError(_expected(given))
    return int(number)


def _expected(given: object) -> str:
    return f"max_memory is {given!r}: give 'auto', or bytes as a number or as text such as '6GB' or '1.5 GiB'"


def free_memory(device: torch.device) -> int:
    """Bytes that can be had without making room for them; on a GPU, those too that torch keeps for its next tensors.

    A container is told how much the whole machine has, and is killed where it takes more than its own limit.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min([psutil.virtual_memory().available, *free_memories()])
