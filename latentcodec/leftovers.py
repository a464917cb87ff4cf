"""Names of what a process has not finished writing, which tell whether the process is still at it or was killed.

A name holds the process and its machine. Of this machine it is known who is alive; what another machine left is taken
for abandoned after a day, since nothing that is written under such a name takes longer.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from pathlib import Path

import psutil

ENDING = ".tmp"
ABANDONED_SECONDS = 86_400.0  # of another machine's files, since they were last written


def unfinished_name(token: str | None = None) -> str:
    """A hidden name, `.TOKEN-PROCESS-MACHINE.tmp`; without a token it is one that nothing has."""
    return f".{token or secrets.token_hex(8)}-{os.getpid()}-{platform.node()}{ENDING}"


def is_leftover(path: Path) -> bool:
    """Whether the process that gave something this name will not finish it; names of no process count as such."""
    _, process, machine = [*path.name.removesuffix(ENDING).split("-", 2), "", ""][:3]
    if not process.isdecimal():
        return True
    if machine == platform.node():
        return not is_alive(int(process))
    try:
        return time.time() - path.lstat().st_mtime > ABANDONED_SECONDS
    except OSError:  # finished meanwhile
        return False


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs; one that has ended and is not yet taken note of does not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # another user's
        return True
