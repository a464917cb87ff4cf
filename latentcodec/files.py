"""Files that appear whole or not at all and survive a power cut, and names that every file and terminal can take.

What is in the files is the affair of others.
"""

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside `path`, then renames: nobody sees half a file, and one that was there stays until then.

    Missing folders are made; permissions follow the umask. A killed process leaves at worst a hidden `.tmp` beside
    it, an error nothing. Raises `OSError` naming `path` where the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:  # of a full disk it names nothing, else the file beside
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)  # an interrupt leaves no litter either


def make_durable(path: Path) -> None:
    """Flushes a file's content, or a folder's names, to the disk, so that a power cut does not undo them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def printable(text: str) -> str:
    """`text` as UTF-8 can hold it: the bytes of a file name that is not UTF-8 become backslash escapes."""
    return text.encode(errors="backslashreplace").decode()
