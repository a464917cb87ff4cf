"""What a run says, even if nobody can hear it: a closed or full terminal does not end a training.

An error begins a line of its own, and an interrupt before the first step is one line.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from tqdm import tqdm

from latentcodec.printable import one_line

SECONDS_BETWEEN = 2.0  # two drawings of a line
INTERRUPTED = "error: interrupted before the first step; what earlier starts saved is untouched\n"


class ForgivingStream:
    """A text stream whose failures, of a pipe that was closed or a disk that is full, end nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            return self._stream.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """From now on into nothing: what waits in the stream's buffer would fail again when the process ends."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def refreshed(line: tqdm[Any] | None) -> Iterator[None]:
    """Within, a line is drawn again every two seconds, so that its reader sees that the program lives."""
    if line is None or line.disable:
        yield
        return
    over, drawn = threading.Event(), line

    def tick() -> None:
        while not over.wait(SECONDS_BETWEEN):
            drawn.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def ticking(text: str, shown: bool = True) -> Iterator[None]:
    """A line with the time so far, if `shown`, while something takes place that has no parts to count."""
    with tqdm(desc=text, bar_format="{desc}: {elapsed}", disable=not shown) as line, refreshed(line):
        yield


def survive_broken_streams() -> None:
    """Let no failure of stdout or stderr end this process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # as after `>&-`
            stream = open(os.devnull, "w")  # noqa: SIM115
        if not isinstance(stream, ForgivingStream):
            setattr(sys, name, ForgivingStream(stream))


def end_at_interrupt() -> None:
    """Until a run takes its own handlers, let Ctrl-C end this process with one line and code 130."""
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, _end)


def report_error(error: object) -> None:
    """ "error: ..." on a line of its own of stderr, even where a bar is being drawn."""
    tqdm.write(one_line(f"error: {error}"), file=sys.stderr)


def _end(number: int, _: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"\r" + INTERRUPTED.encode())
    os._exit(128 + number)
