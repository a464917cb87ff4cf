"""What a run takes of the machine: its number format, decided once when it begins, its threads and its processes.

`train.mixed_precision: auto` becomes what the machine computes fast in (`machine.py`), or what `accelerate launch` was
told. The run's configuration keeps what it became, so that a resume on another machine goes on in the same format and
says what is different there, before it changes a number.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from latentcodec import machine
from latentcodec.training.checkpoint import Checkpoint
from latentcodec.training.config import Config
from latentcodec.training.watchdog import OTHERS, doing

LAUNCHER = (
    "ACCELERATE_MIXED_PRECISION"  # what `accelerate launch --mixed_precision` was told; "no" also by default
)
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by train.mixed_precision
Precision = Literal["no", "bf16", "fp16"]
NAMES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Hardware:
    """What a run computes with on this machine."""

    precision: Precision
    """A value of train.mixed_precision other than auto."""
    threads: int
    """Of each process, for torch."""
    processes: int
    """Of the run, on all its machines."""
    global_batch: int
    """Images of an optimizer step, of all processes."""
    notes: list[str]
    """Lines for the user, the first of which says what is computed with; then warnings and differences."""

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, since it decides about the rounding of sums."""
        return {"threads": self.threads, "instructions": machine.instruction_sets()}


def take_hardware(config: Config, found: Checkpoint | None, state: PartialState) -> Hardware:
    """Decide the number format and let torch take this process's cores. `found`: the checkpoint to go on from.

    All processes come to the same format: bfloat16 only where it is fast for each of them.
    """
    train, device = config.train, state.device
    saved = None if found is None else found.state["config"]["train"]["mixed_precision"]
    doing(OTHERS)
    fast = all(gather_object([machine.training_dtype(device) == torch.bfloat16]))
    natural = "bf16" if fast else "no"
    told = os.environ.get(LAUNCHER, "no").replace("no", "")  # "no" it also says when it was told nothing
    chosen = next(name for name in (train.mixed_precision, saved, told, natural) if name in DTYPES)
    precision = cast(Precision, chosen)
    here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)))
    threads = machine.use_cores(here, config.data.workers, None if train.threads == "auto" else train.threads)
    batch = train.batch_size * train.accumulation * state.num_processes
    hardware = Hardware(precision, threads, state.num_processes, batch, [_summary(precision, threads, state)])
    hardware.notes.extend(_emulation(precision, device) if state.is_main_process else [])
    hardware.notes.extend(_differences(hardware, found, saved, natural))
    return hardware


def settled(config: Config, hardware: Hardware) -> Config:
    """The configuration with what `auto` became as its number format."""
    return replace(config, train=replace(config.train, mixed_precision=hardware.precision))


def _summary(precision: str, threads: int, state: PartialState) -> str:
    device = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else machine.cpu_name()
    flags = f" ({' '.join(machine.instruction_sets())})" if state.device.type == "cpu" else ""
    each = f"{state.num_processes} processes of {threads}" if state.num_processes > 1 else f"{threads}"
    cores = machine.physical_cores()
    return f"training in {NAMES[precision]} on {device}{flags}: {each} threads, {cores} cores to be had"


def _emulation(precision: str, device: torch.device) -> list[str]:
    """A warning, with the measured cost, of a format that the machine emulates or is slow in."""
    if precision != "bf16" or machine.is_fast(torch.bfloat16, device):
        return []  # fp16 without a GPU is refused
    cost = machine.emulation_cost(torch.bfloat16, device)
    return [
        f"warning: bfloat16 is slow on this machine or emulated: a convolution takes {cost:.1f} times as long as in "
        "float32 (--train.mixed_precision no)"
    ]


def _differences(hardware: Hardware, found: Checkpoint | None, saved: str | None, natural: str) -> list[str]:
    """What is not as it was when the checkpoint was written, and what that changes."""
    if found is None:
        return []
    notes = []
    if saved in DTYPES and saved != hardware.precision:
        notes.append(
            f"train.mixed_precision was {saved} up to step {found.step} and is {hardware.precision} from here on: "
            "the numbers change"
        )
    elif saved == "no" and natural == "bf16":
        notes.append(
            "this run began in float32 and stays so; this machine has units for bfloat16 "
            "(--train.mixed_precision bf16 would use them, and change the numbers)"
        )
    return notes + _other_sums(hardware, found)


def _other_sums(hardware: Hardware, found: Checkpoint) -> list[str]:
    """What changes the sums over the images of a step: how many there are, and who adds them in which order."""
    notes, processes = [], found.state.get("processes", hardware.processes)
    batch = found.state.get("global_batch", hardware.global_batch)  # older checkpoints have neither
    if batch != hardware.global_batch:
        notes.append(
            f"the global batch was {batch} images (processes: {processes}) up to step {found.step} and is "
            f"{hardware.global_batch} (processes: {hardware.processes}) from here on: the stream goes on behind the "
            "samples drawn so far, and the numbers change"
        )
    before, now = found.state.get("machine", {}), hardware.record()
    changed = [
        f"{key} {_text(before[key])}, now {_text(now[key])}"
        for key in now
        if before.get(key, now[key]) != now[key]
    ]
    by = "on another machine" if changed else "by another number of processes"
    if processes != hardware.processes:
        changed.append(f"processes {processes}, now {hardware.processes}")
    if changed:
        same = ", so numbers equal an undisturbed run's to rounding only" if not notes else ""
        notes.append(
            f"the checkpoint was written {by} ({'; '.join(changed)}): sums are added in another order{same}"
        )
    return notes


def _text(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
