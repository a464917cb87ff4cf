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
    return f".{token or secrets.token_hex(8)}-{os.getpid()}-{this_machine()}{ENDING}"


def this_machine() -> str:
    """Its name and where its processes are numbered: containers can share the name and have numbers of their own."""
    try:
        return f"{platform.node()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return platform.node()


def is_leftover(path: Path) -> bool:
    """Whether the process that gave something this name will not finish it; a name without a process is left over."""
    _, process, machine = [*path.name.removesuffix(ENDING).split("-", 2), "", ""][:3]
    if not process.isdecimal():
        return True
    if machine == this_machine():
        return not is_alive(int(process))
    try:
        return time.time() - path.lstat().st_mtime > ABANDONED_SECONDS
    except OSError:  # finished meanwhile
        return False


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs; one that has ended and is not yet taken note of does not."""
    if not psutil.pid_exists(process):
        return False
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:  # another user's, of whom nothing is told
        return True
