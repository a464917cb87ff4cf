"""CUDA graphs: a pass recorded once and replayed, without Python between its kernels.

At 512 x 512 pixels a GPU finishes a layer before Python has launched the next one. A recording holds the memory of its
pass, so each network has at most one, for the kind of input that it saw last, and none whose maps would take more than
1/64 of the GPU's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from latentcodec.engine.checks import modules_within, settings_of

SHARE_OF_MEMORY = 1 / 64  # of a GPU's memory: the most that the maps of a recorded pass may take

Pass = Callable[[Tensor], list[Tensor]]
"""Computes the strips of a network's result from its input."""


class Recording:
    """One pass over inputs of one shape, dtype and device, with the weights where they lay."""

    def __init__(self, run: Pass, x: Tensor) -> None:
        self.input = x.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.strips = run(self.input)

    def replay(self, x: Tensor) -> list[Tensor]:
        """The strips of the result, in memory that the next replay overwrites."""
        self.input.copy_(x)
        self.graph.replay()
        return self.strips


_seen: WeakKeyDictionary[nn.Module, tuple[Any, Recording | None]] = WeakKeyDictionary()
_lock = Lock()  # between a replay and the reading of its result no other thread may replay


def is_replayable(x: Tensor, maps: int) -> bool:
    """Whether a pass over x may be recorded, and is small enough for it; `maps` are the bytes of its feature maps."""
    return (
        x.is_cuda
        and maps <= torch.cuda.get_device_properties(x.device).total_memory * SHARE_OF_MEMORY
        and not torch.cuda.is_current_stream_capturing()
    )


def replayed(
    network: nn.Module, x: Tensor, plan: Callable[[], Pass], join: Callable[[list[Tensor]], Tensor]
) -> Tensor:
    """join(plan()(x)); recorded when an input like x comes for the second time in a row, and replayed from then on.

    Weights are read anew at each replay; where they lie elsewhere, a layer's settings have changed, or x is of another
    kind, it is not replayed.
    """
    modules = list(modules_within(network))
    settings = [settings_of(module) for module in modules]
    places = [
        weight.data_ptr()
        for module in modules
        for weight in module._parameters.values()
        if weight is not None
    ]
    key = x.shape, x.dtype, x.device, settings, places
    with _lock:
        known, recording = _seen.get(network, (None, None))
        with torch.inference_mode():
            if known != key:
                _seen[network], strips = (key, None), plan()(x)
            else:
                recording = recording or Recording(plan(), x)
                _seen[network], strips = (key, recording), recording.replay(x)
        return join(strips)


def forget(network: nn.Module) -> None:
    """Let the recording of a network go."""
    with _lock:
        _seen.pop(network, None)
