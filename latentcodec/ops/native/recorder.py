"""A run of native functions, recorded once and called again without the Python around them.

For small maps Python takes as long as the work. What happens between the native functions of a pass is allocation and
views alone, so the functions with their arguments are all that must be called again, in the same memory, for the same
result from another input. Whatever else torch computes in between makes a recording incomplete, and useless.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentcodec.ops.native.build import recording

EMPTY = torch.ops.aten.empty.memory_format
NOWHERE = -1  # the address of what has no storage: numbers, packed weights
RESIZE = torch.ops.aten.resize_.default


class Recorder(TorchDispatchMode):
    """While it is entered, the calls of native functions in this thread; their memory is used again as it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.is_complete = True
        self.free: list[bytearray] = []
        self.bytes = 0

    def __enter__(self) -> Recorder:
        recording.calls = self.calls
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        recording.calls = None
        super().__exit__(*details)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is EMPTY:
            return self._allocated(tuple(args[0]), (kwargs or {}).get("dtype") or torch.get_default_dtype())
        result = function(*args, **kwargs or {})
        is_view = not function._schema.is_mutable and _memory(result) <= _memory(args)
        self.is_complete &= is_view or function is RESIZE
        return result

    def _allocated(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that belongs to the recording, and is free again when the last tensor in it is gone."""
        size = max(1, math.prod(shape)) * dtype.itemsize
        fitting = [block for block in self.free if size <= len(block) <= 2 * size + 4096]
        if fitting:
            block = min(fitting, key=len)
            self.free = [other for other in self.free if other is not block]
        else:
            block = bytearray(size)
            self.bytes += size
        lent = memoryview(block)
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.frombuffer(lent, dtype=dtype)[: math.prod(shape)].view(shape)

    def _give_back(self, block: bytearray) -> None:
        self.free.append(block)


def _memory(values: Any) -> set[int]:
    """The addresses of all storages in arguments or in a result; what has none counts as memory of its own."""
    leaves = tree_leaves(values)
    if not isinstance(values, tuple):  # a result: what is no tensor was computed as well
        return {_address(value) for value in leaves}
    return {_address(value) for value in leaves if isinstance(value, Tensor)} - {NOWHERE}


def _address(value: Any) -> int:
    has_storage = isinstance(value, Tensor) and not value.is_mkldnn
    return value.untyped_storage().data_ptr() if has_storage else NOWHERE
