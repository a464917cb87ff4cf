"""The lock of a run's folder: two runs that write to one folder would spoil each other's checkpoints.

The lock is a file `.lock` in the folder, locked by the operating system (`filelock`), so it is free again as soon as
its process is gone, however that ended. A second lock lies in the machine's temporary folder under the identity
of the run's folder: it keeps another run out even if somebody has removed `.lock`.
"""

from __future__ import annotations

import os
import platform
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"  # in output_dir: held by the main process of a run
_held: dict[Path, list[FileLock]] = {}  # by folder: until the process ends


def hold(folder: Path) -> None:
    """Keep other runs out of `folder` as long as this process lives.

    Raises ValueError, naming the process where it is known, if another run is there. A disk that cannot lock files
    keeps nobody out.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    owner = folder / LOCK
    locks = [FileLock(path, mode=0o666) for path in (_beside(folder), owner)]
    for lock in locks:
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            for taken in locks:
                taken.release()
            raise ValueError(
                f"output_dir {folder} is that of another run, process {_name(owner)}, which is still writing there; "
                "end it first, or choose another folder"
            ) from error
        except (OSError, NotImplementedError):
            pass  # this disk knows no locks
    _held[folder] = locks
    with suppress(OSError):  # whose lock it is helps people; a full disk is for others to name
        owner.write_text(f"{os.getpid()} on {platform.node()}\n")


def _beside(folder: Path) -> Path:
    """The second lock: a name for this folder that depends on the folder itself and not on what is in it."""
    status = folder.stat()
    # A container may run as a user of whom the system knows only the number; Windows has a temporary folder for each.
    user = os.getuid() if hasattr(os, "getuid") else 0
    name = f"latentcodec-{user}-{status.st_dev:x}-{status.st_ino:x}.lock"
    return Path(tempfile.gettempdir(), name)


def _name(owner: Path) -> str:
    with suppress(OSError):
        return owner.read_text(errors="replace")[:100].strip() or "unknown"
    return "unknown"
