"""What a run says while it does something other than steps, so that nothing is silent for longer than a moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import PartialState
from tqdm.auto import tqdm

from latentcodec.training.console import ticking
from latentcodec.training.watchdog import doing

T = TypeVar("T")


@contextmanager
def phase(text: str) -> Iterator[None]:
    """A line with the time so far, from the main process, while something takes place that has no parts to count."""
    doing(text)
    with ticking(text, shown=_is_main()):
        yield


def counted(parts: Iterable[T], text: str, total: int, unit: str) -> Iterator[T]:
    """`parts`, `total` of them, under a bar of the main process, which goes away at the end."""
    bar: tqdm[Any] = tqdm(parts, desc=text, total=total, unit=unit, disable=not _is_main(), leave=False)
    with bar:
        for part in bar:
            doing(text)
            yield part


def _is_main() -> bool:
    """Whether this is the main process of a run, or a process that knows of no others."""
    return not PartialState._shared_state or bool(PartialState().is_main_process)
