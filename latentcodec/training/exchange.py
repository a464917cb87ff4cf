"""What the processes of a run tell each other in each step, in one exchange, and how long the step took.

Each process knows its own losses, its own clock, whether it was asked to stop and which images it could not read. All
processes must act on the same numbers, or they would train different models: so after each backward pass they gather
one row of numbers from each.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from latentcodec.training.data.stream import Batches
from latentcodec.training.signals import StopRequest
from latentcodec.training.watchdog import OTHERS, doing, running_time


def wait_for_others(processes: Accelerator | PartialState) -> None:
    """Return when every process of the run has come here."""
    doing(OTHERS)
    processes.wait_for_everyone()


@dataclass(frozen=True)
class Gathered:
    """What all processes know after an exchange: the same in each of them."""

    means: dict[str, float]
    """Of each number that was given, over the processes."""
    seconds: float
    """Since the exchange before: of the process with the fewest, since others wait for one that was stopped."""
    waited: float
    """Seconds in this step for which the slowest process waited for data, which holds up all."""
    stopped_by: int
    """The signal that some process has received; 0 for none."""
    rejected: bool
    """Whether some process has met an unreadable image."""


class Exchange:
    """The exchanges of one start of a run."""

    def __init__(self, accelerator: Accelerator, batches: Batches, stop: StopRequest) -> None:
        self.accelerator, self.batches, self.stop = accelerator, batches, stop
        self._gathered_at = running_time()
        self.begin_step()

    def begin_step(self) -> None:
        """Start the clock of a step, before its batches are asked for."""
        self._began, self._waited_before = time.perf_counter(), self.batches.waited_seconds

    def gather(self, numbers: dict[str, Tensor], rejected: bool) -> Gathered:
        """Exchange scalars by name, whether an image was rejected here, the clocks and the requests to stop."""
        now = running_time()
        waited = self.batches.waited_seconds - self._waited_before
        notes = [now - self._gathered_at, float(self.stop.received), float(rejected), waited]
        self._gathered_at = now
        row = [torch.stack([value.detach().float() for value in numbers.values()])]
        row.append(torch.tensor(notes, device=self.accelerator.device))
        doing(OTHERS)
        table = self.accelerator.gather(torch.cat(row)[None])  # [processes, numbers]
        doing("taking a step")
        *means, _, _, _, _ = table.mean(0).tolist()
        *_, seconds, _, _, _ = table.amin(0).tolist()
        *_, stopped_by, any_rejected, longest_wait = table.amax(0).tolist()
        named = dict(zip(numbers, means, strict=True))
        return Gathered(named, seconds, longest_wait, int(stopped_by), any_rejected > 0)

    def timing(self, images: int, gathered: Gathered) -> dict[str, float]:
        """What metrics.jsonl says of the speed of a step of so many images, of all processes."""
        seconds = time.perf_counter() - self._began
        return {
            "images_per_second": images / seconds,
            "step_seconds": seconds,
            "waited_seconds": gathered.waited,
        }
