"""CUDA graphs: a pass recorded once and replayed, without Python between its kernels.

At 512 x 512 pixels a GPU finishes a layer before Python has launched the next one. A recording holds the memory of its
pass, so each network has at most one, for the kind of input that it saw last, and none whose maps would take more than
1/64 of the GPU's memory. What cannot be recorded runs as if nobody had tried.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from latentcodec.engine.checks import modules_within, settings_of

log = logging.getLogger(__name__)

SHARE_OF_MEMORY = 1 / 64  # of a GPU's memory: the most that the maps of a recorded pass may take

Run = partial[list[Tensor]]
"""Computes the strips of a network's result from its input: a method of a pass, and the network."""
Plan = Callable[[], Run]
Join = Callable[[list[Tensor]], Tensor]
"""Makes one tensor of its own of the strips."""


class Recording:
    """One pass over inputs of one shape, dtype and device, with the weights where they lay."""

    def __init__(self, run: Run, x: Tensor) -> None:
        self.input = x.clone()
        self.graph = torch.cuda.CUDAGraph()
        self.has_been_read = torch.cuda.Event()
        # torch's own stream for recordings is on the GPU of its first one; and where a recording fails, `graph` leaves
        # its stream the current one.
        side = torch.cuda.Stream()
        with (
            torch.cuda.stream(side),
            torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"),
        ):
            self.strips = run(self.input)

    def result(self, x: Tensor, join: Join) -> Tensor:
        """The result for x, in memory of its own; a lock orders threads, the event their streams."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.has_been_read)
        with torch.inference_mode():
            self.input.record_stream(stream)  # if the recording goes, its memory is free after this replay
            strips = self.replay(x)
        joined = join(strips)
        self.has_been_read.record(stream)
        return joined

    def replay(self, x: Tensor) -> list[Tensor]:
        """The strips of the result, in memory that the next replay overwrites."""
        self.input.copy_(x)
        self.graph.replay()
        return self.strips


@dataclass
class Known:
    """What is known of a network's passes over the kind of input that it saw last."""

    key: Any
    planned: Any
    """The pass as it was planned for the first such input, without its memory: a recording must not compile anything,
    and other strips may need other functions. None after a failure."""
    recording: Recording | None = None

    def recorded(self, plan: Plan, x: Tensor) -> Recording | None:
        """The recording; made now where there is none, unless that has failed before."""
        if self.recording is None and self.planned is not None:
            with torch.inference_mode():
                run = plan()
                try:
                    self.recording = Recording(partial(run.func, self.planned, *run.args[1:]), x)
                except RuntimeError as error:  # CUDA forbids some calls in a recording; or memory is short
                    self.planned = None
                    log.warning("a pass runs without a CUDA graph, slower but equal: %s", error)
        return self.recording


_seen: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()
_lock = Lock()  # between a replay and the reading of its result no other thread may replay


def is_replayable(x: Tensor, maps: int) -> bool:
    """Whether a pass over x may be recorded, and is small enough for it; `maps` are the bytes of its feature maps."""
    return (
        x.is_cuda
        and maps <= torch.cuda.get_device_properties(x.device).total_memory * SHARE_OF_MEMORY
        and not torch.cuda.is_current_stream_capturing()
    )


def replayed(network: nn.Module, x: Tensor, plan: Plan, join: Join) -> Tensor:
    """join(plan()(x)); recorded when an input like x comes for the second time in a row, and replayed from then on.

    Weights are read anew at each replay; where they lie elsewhere, a layer's settings have changed, or x is of another
    kind, it is not replayed. The GPU of x is the current one.
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
        known = _seen.get(network)
        if known is not None and known.key == key and (recording := known.recorded(plan, x)) is not None:
            return recording.result(x, join)
        with torch.inference_mode():
            run = plan()
            strips = run(x)
            if known is None or known.key != key:
                scratch = run.args[0].scratch.new_empty(0)
                _seen[network] = Known(key, replace(run.args[0], scratch=scratch))
        return join(strips)


def forget(network: nn.Module) -> None:
    """Let the recording of a network go."""
    with _lock:
        _seen.pop(network, None)
