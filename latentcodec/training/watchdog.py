"""Ends a run that has come to a standstill, with a sentence that says what it was waiting for.

A file on a network disk that does not answer, a data worker that was stopped, another process of the run that is gone
without a word: each of them would let a run wait for ever, on a machine that is paid for. So whatever can wait says
what it begins (`doing`); a thread ends the process where nothing new has been said for `train.patience_minutes`.

Only the time in which this process itself could run counts: one that was stopped for a night, or whose machine
slept, has all its patience left, and all its `train.max_minutes`, which are told by `running_time`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import psutil

from latentcodec.training.console import report_error

TICK_SECONDS = 1.0
FAILED = 1  # exit code
READING = "reading images"
OTHERS = "waiting for the other processes"
GRADIENTS = f"computing gradients, {OTHERS}"  # whose gradients are averaged while they are computed
# A process that waits for the others is left more time, so that the one that knows what is wrong speaks first.
FOR_OTHERS = 1.1
# Torch's own patience with a collective operation, in ours: it ends with a traceback.
FOR_TORCH = 1.5

# The watch looks at the clock every second. Where it could not for so long, the process was stopped; for less, a call
# into a library may have kept it from looking.
STOPPED_SECONDS = 10.0
SECONDS_TO_SPEAK = 10.0  # a terminal may hang as well


class _Looks:
    """Of one watch: when it last looked at the clock, and for how many seconds the process had been stopped by then."""

    def __init__(self) -> None:
        self._last = time.monotonic(), 0.0  # one value, since two threads read it

    def look(self) -> None:
        """What the watch does every second."""
        self._last = self._now()

    def running_time(self) -> float:
        """Seconds of the clock, but for those in which the process was stopped; also before the watch has noticed."""
        now, stopped = self._now()
        return now - stopped

    def _now(self) -> tuple[float, float]:
        before, stopped = self._last  # first: a stop between the two lines then counts
        now = time.monotonic()
        return now, stopped + (now - before if now - before > STOPPED_SECONDS else 0.0)


@dataclass
class _Activity:
    """What this process is at."""

    what: str = "starting"
    timed: bool = True
    signs_of_life: int = 0
    looks: _Looks | None = None
    """Of the watch, while there is one."""


_now = _Activity()


def doing(what: str, timed: bool = True) -> None:
    """Say what this process begins to do, or to wait for, such as "reading images": a sign of life.

    What is not `timed` may take as long as it takes, as a download may.
    """
    _now.what, _now.timed, _now.signs_of_life = what, timed, _now.signs_of_life + 1


def running_time() -> float:
    """Seconds of a clock that stands still while this process is stopped: by Ctrl-Z, or for another job.

    Only in a process that is watched; in others it is a plain clock.
    """
    looks = _now.looks
    return time.monotonic() if looks is None else looks.running_time()


def collective_timeout(minutes: float) -> timedelta:
    """How long torch shall wait for other processes, of a run that has so many minutes of patience."""
    return timedelta(minutes=minutes * FOR_TORCH)


@contextmanager
def watching(minutes: float, end: Callable[[int], object] = os._exit) -> Iterator[None]:
    """End this process with code 1 if `doing` is not called for so many minutes within the `with` block.

    Its data workers are ended with it. `end` takes the exit code; it must not wait for anything, as `sys.exit` would.
    """
    over = threading.Event()
    _now.looks = _Looks()
    threading.Thread(target=_watch, args=(minutes, over, end), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        _now.looks = None


def _watch(minutes: float, over: threading.Event, end: Callable[[int], object]) -> None:
    seen, seconds, before = _now.signs_of_life, 0.0, time.monotonic()
    while not over.wait(TICK_SECONDS):
        if looks := _now.looks:
            looks.look()
        now = time.monotonic()
        seconds, before = seconds + min(now - before, 2 * TICK_SECONDS), now
        if seen != _now.signs_of_life or not _now.timed:
            seen, seconds = _now.signs_of_life, 0.0
        elif seconds > 60 * minutes * (FOR_OTHERS if OTHERS in _now.what else 1):
            _give_up(minutes)
            end(FAILED)
            return


def _give_up(minutes: float) -> None:
    workers = psutil.Process().children(recursive=True)
    speaker = threading.Thread(target=report_error, args=(_sentence(minutes, workers),), daemon=True)
    speaker.start()
    speaker.join(SECONDS_TO_SPEAK)
    for worker in workers:
        with suppress(psutil.Error):
            worker.kill()


def _sentence(minutes: float, workers: list[psutil.Process]) -> str:
    rank = (
        f"process {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}: "
        if "RANK" in os.environ
        else ""
    )
    said = f"{rank}nothing has happened for {minutes:g} minutes (train.patience_minutes) while {_now.what}."
    if _now.what.startswith("reading"):
        said += " Does the disk or the server with the images (data.path) answer?"
        if states := [line for worker in workers if (line := _state(worker))]:
            said += f" The data workers: {'; '.join(states)}."
    elif OTHERS in _now.what:
        said += " Was one of them stopped, or does its machine not answer?"
    return f"{said} The same command goes on from the last checkpoint."


def _state(worker: psutil.Process) -> str:
    """What a worker is at, as far as the system says it without asking the worker."""
    with suppress(psutil.Error, OSError):
        files = [file.path for file in worker.open_files() if file.mode == "r"]
        return f"{worker.pid} ({worker.status()})" + (f" with {files[0]} open" if files else "")
    return ""
