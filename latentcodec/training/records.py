"""Lines of JSON, and files that are written whole: how the records of a run are kept, and what a failure says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentcodec.files import append_file, write_whole
from latentcodec.printable import printable


def json_line(record: dict[str, Any]) -> str:
    """One line; JSON has no infinity, which a perfect PSNR is."""
    return json.dumps(
        {k: None if v in (math.inf, -math.inf) else v for k, v in record.items()}, allow_nan=False
    )


def record_of(line: bytes, key: str | None = None) -> dict[str, Any] | None:
    """What a line of JSON says; None if it is damaged, as by zeros after a power cut."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    is_sound = isinstance(record, dict) and (key is None or type(record.get(key)) is int)
    return record if is_sound else None


def append(path: Path, line: str) -> None:
    """Add a line to a file. Raises `OSError` naming it and the bytes that it needs."""
    content = f"{printable(line)}\n".encode()
    with _named_on_failure(path, content):
        append_file(path, content)


def write(path: Path, content: bytes) -> None:
    """Replace a file. Raises `OSError` naming it and the bytes that it needs."""
    with _named_on_failure(path, content):
        write_whole(path, content)


@contextmanager
def _named_on_failure(path: Path, content: bytes) -> Iterator[None]:
    """The system's error for a full disk names no file; ours does, and says how many bytes it needs."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} cannot be written, it needs {len(content):,} bytes: {error.strerror}. "
            "The checkpoints are untouched."
        ) from error
