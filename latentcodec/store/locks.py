"""Locks of the processes that encode into one store, so that no rank runs twice.

They hold among processes that see each other's locks, which are those of one machine, and of some network shares.
Without them work is done twice at worst: all processes write equal files, each whole or not at all.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from latentcodec.store.format import LOCKS, StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOOKS = 100  # at a lock, in a second: who looks for stale locks holds each for a moment


@contextmanager
def rank_lock(store: Path, rank: int, world: int) -> Iterator[None]:
    """Holds this rank of this store. Raises StoreError where another process of this machine is this rank already."""
    path = store / LOCKS / f"{rank}-of-{world}"
    with _opened(path) as file:
        looks = 1
        while not (is_taken := _taken(file)) and looks < LOOKS:
            time.sleep(0.01)
            looks += 1
        if not is_taken:
            raise StoreError(f"{store}: another process is encoding into this store (rank {rank} of {world})")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # others are still at work
                path.parent.rmdir()


def remove_stale_locks(store: Path) -> None:
    """Removes the locks of processes that were killed."""
    with suppress(OSError):  # others are still at work, or there are none
        for path in list((store / LOCKS).iterdir()):
            with path.open("r+b", buffering=0) as file:
                if _taken(file):
                    path.unlink()
        (store / LOCKS).rmdir()


def _opened(path: Path) -> FileIO:
    """The lock's file, made where it is not there; another process may take its folder away at any moment."""
    while True:
        with suppress(FileNotFoundError):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                if path.parent.exists() and not path.parent.is_dir():
                    raise
            return path.open("a+b", buffering=0)


def _taken(file: FileIO) -> bool:
    """Locks a file until it is closed; False where another process holds it.

    A lock of records: the kind of `flock` would live on in the decoding workers of a process that was killed.
    """
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # else a file system without locks
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True
