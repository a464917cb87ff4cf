"""What a run says while it does something other than steps, so that nothing is silent for longer than a moment."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import PartialState
from tqdm.auto import tqdm

from latentcodec.files import one_line

T = TypeVar("T")

SECONDS_BETWEEN = 2.0  # two lines of a phase that has no parts to count
ELAPSED = "{desc}: {elapsed}"


@contextmanager
def phase(text: str) -> Iterator[None]:
    """A line with the time so far, from the main process, while something takes place that has no parts to count."""
    over = threading.Event()
    with tqdm(desc=text, bar_format=ELAPSED, disable=not _is_main()) as line:

        def tick() -> None:
            while not over.wait(SECONDS_BETWEEN):
                line.refresh()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def counted(parts: Iterable[T], text: str, total: int, unit: str) -> Iterator[T]:
    """`parts`, `total` of them, under a bar of the main process, which goes away at the end."""
    bar: tqdm[Any] = tqdm(parts, desc=text, total=total, unit=unit, disable=not _is_main(), leave=False)
    with bar:
        yield from bar


def report_error(error: object) -> None:
    """ "error: ..." on a line of its own of stderr, even where a bar is being drawn."""
    tqdm.write(one_line(f"error: {error}"), file=sys.stderr)


def _is_main() -> bool:
    """Whether this is the main process of a run, or a process that knows of no others."""
    return not PartialState._shared_state or bool(PartialState().is_main_process)
