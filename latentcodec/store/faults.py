"""Which faults are those of one picture, which is left out, and which are the machine's, which stop the encoding.

A picture that is left out of a shard stays out. So a disk that is not mounted, or a process without memory, must not
look like broken pictures: whoever encodes stops, and goes on when the disk is back.

Shapes: none.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from latentcodec.pixels import UnreadableImage
from latentcodec.printable import existing
from latentcodec.store.items import CACHE, Entry

OF_THE_MACHINE = frozenset(
    (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
)
THEN = "nothing was left out for it; mend this, and the same command goes on"


@contextmanager
def only_faults_of(entry: Entry) -> Iterator[None]:
    """Lets UnreadableImage pass where the picture's own file is at fault, and makes an OSError of it elsewhere.

    That names the source where it is gone, or what the system says: of the disk, of memory, of open files.
    """
    try:
        yield
    except UnreadableImage as error:
        _require_source(entry)
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in OF_THE_MACHINE:
            raise OSError(cause.errno, f"{error}; {THEN}") from error
        if isinstance(cause, MemoryError) and entry.kind != CACHE:  # whose header may ask for any amount
            raise OSError(errno.ENOMEM, f"{entry.path}: there is no memory to read it; {THEN}") from error
        raise


def _require_source(entry: Entry) -> None:
    """Raises FileNotFoundError where the folder or tar of a picture is gone, or is the empty place of a disk."""
    if entry.kind == "row":
        return
    source = existing(entry.source)
    if not source.exists():
        raise FileNotFoundError(errno.ENOENT, f"the source {entry.source} is gone; {THEN}")
    if source.is_dir() and not os.listdir(source):
        raise FileNotFoundError(
            errno.ENOENT, f"the source {entry.source} is empty, as where its disk is not mounted; {THEN}"
        )
