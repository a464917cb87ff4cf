"""What the verbs share: options, and what they print.

Progress goes to stderr, results to stdout, and with --json one last line for programs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

DONE, FAILED, WRONG, LOOK, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes
LINE_SECONDS = 30.0  # between two lines of progress where stderr is a file

Json = Annotated[bool, typer.Option("--json", help="End stdout with one line of JSON.")]
Codec = Annotated[
    str,
    typer.Option(
        "--codec", help="Bundled name, folder, .safetensors file or name on the hub.", show_default=False
    ),
]
DEVICE = "cpu or cuda; by default a GPU where there is one."  # as `machine.usable_device` chooses
Device = Annotated[str | None, typer.Option(help=DEVICE)]


def say_json(asked: bool, content: dict[str, Any]) -> None:
    """The last line of stdout, where it was asked for; numbers that are not finite become null."""
    if asked:
        from latentcodec.finite import finite

        print(json.dumps(finite(content), allow_nan=False))


def number_of(count: int, unit: str) -> str:
    """Such as "1 picture", "1,200 pictures" or "3 passes"."""
    return f"{count:,} {unit if count == 1 else _plural(unit)}"


def _plural(unit: str) -> str:
    return f"{unit}es" if unit.endswith("s") else f"{unit}s"


def _left_out(count: int, unit: str) -> str:
    """What a line of progress ends with: ", 3 pictures left out", or nothing."""
    return f", {number_of(count, unit)} left out" if count else ""


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"warning: {text}", file=sys.stderr)


@contextmanager
def counting(total: int, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Shows progress; gives a function that takes how many more were done, and how many more were left out.

    `unit`: what is counted, in the singular. On a terminal a bar with rate, time to go and what was left out; else a
    line every half minute.
    """
    if sys.stderr.isatty():
        with _bar(total, unit) as advance:
            yield advance
    else:
        yield _Lines(total, unit).advance


@contextmanager
def _bar(total: int, unit: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn(f"{_plural(unit)}  {{task.fields[rate]}}"),
        TimeRemainingColumn(), TextColumn("to go{task.fields[rejected]}"),
    )  # fmt: skip
    begun, left_out = time.monotonic(), 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, rate="", rejected="")

        def advance(done: int, rejected: int) -> None:
            nonlocal left_out
            left_out += rejected
            finished = progress.tasks[0].completed + done + rejected
            rate = finished / max(time.monotonic() - begun, 1e-9)
            note = _left_out(left_out, unit)
            progress.update(task, advance=done + rejected, rate=f"{rate:.1f}/s", rejected=note)

        yield advance


class _Lines:
    """Progress as lines."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit = total, unit
        self.begun = self.last = time.monotonic()
        self.done = self.rejected = 0

    def advance(self, done: int, rejected: int) -> None:
        self.done += done + rejected
        self.rejected += rejected
        now = time.monotonic()
        if now - self.last >= LINE_SECONDS:
            self.last = now
            rate = self.done / (now - self.begun)
            minutes = (self.total - self.done) / rate / 60 if rate else float("inf")
            print(
                f"{self.done:,} of {number_of(self.total, self.unit)}, {rate:.1f}/s, {minutes:.0f} minutes to go"
                f"{_left_out(self.rejected, self.unit)}",
                file=sys.stderr,
                flush=True,
            )
