"""Locks of the processes that encode into one store, so that no rank runs twice.

They hold among processes that see each other's locks, which are those of one machine, and of some network shares.
Without them work is done twice at worst: all processes write equal files, each whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from latentcodec.store.format import LOCKS, StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def rank_lock(store: Path, rank: int, world: int) -> Iterator[None]:
    """Holds this rank of this store. Raises StoreError where another process of this machine is this rank already."""
    path = store / LOCKS / f"{rank}-of-{world}"
    with _opened(path) as file:
        if not _taken(file):
            raise StoreError(f"{store}: another process is encoding into this store (rank {rank} of {world})")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # others are still at work
                path.parent.rmdir()


def remove_stale_locks(store: Path) -> None:
    """Removes the locks of processes that were killed."""
    for path in (store / LOCKS).glob("*-of-*"):
        with suppress(FileNotFoundError), path.open("r+b", buffering=0) as file:
            if _taken(file):
                path.unlink()
    with suppress(OSError):  # others are still at work, or there are none
        (store / LOCKS).rmdir()


def _opened(path: Path) -> FileIO:
    """The lock's file, made where it is not there; another process may take its folder away at any moment."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.open("a+b", buffering=0)


def _taken(file: FileIO) -> bool:
    """Locks a file until it is closed; False where another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
