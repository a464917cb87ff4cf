"""The manifest of a checkpoint: size and SHA-256 of every file, by which damage is noticed before anything is used.

How a checkpoint is written, found and removed is in `checkpoint.py`.
"""

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

from latentcodec.files import read_regular

STATE = "state.json"
MANIFEST = "manifest.json"
CONTENTS = (".safetensors", ".pt")


class CheckpointError(OSError):
    """A checkpoint could not be written or read; `errno` is the system's, the message names the path."""

    def __str__(self) -> str:
        return str(self.strerror)  # the message alone; an OSError would put the number before it


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over, or an old one could not be removed. Training goes on."""


class DamagedCheckpoint(CheckpointError):
    """A committed checkpoint is not what its manifest says; the message names folder, file and reason."""

    def __init__(self, path: Path, file: str, reason: str) -> None:
        super().__init__(errno.EBADMSG, f"the checkpoint {path} is damaged: {file}: {reason}")


def entry_of(data: bytes) -> dict[str, Any]:
    """What the manifest says of a file with this content."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def verify(path: Path) -> None:
    """Compare every file of a folder with its manifest, and so the manifest with every file.

    Raises DamagedCheckpoint.
    """
    try:
        manifest = json.loads(read_file(path, MANIFEST))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(path, MANIFEST, f"it is not JSON ({error})") from error
    if not isinstance(manifest, dict) or STATE not in manifest:
        raise DamagedCheckpoint(path, MANIFEST, "it is not the manifest of a checkpoint")
    for name, expected in manifest.items():
        if Path(name).name != name:
            raise DamagedCheckpoint(path, MANIFEST, f"it names {name!r}, which is no file in this folder")
        found = entry_of(read_file(path, name))
        if found != expected:
            raise DamagedCheckpoint(path, name, f"it is {found}, the manifest says {expected}")
    for file in _files(path):  # it would be loaded as a part of the checkpoint
        if file.suffix in CONTENTS and file.name not in manifest:
            raise DamagedCheckpoint(
                path, file.name, "the manifest does not list it; move it out of the folder"
            )


def _files(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise DamagedCheckpoint(path, path.name, str(error.strerror)) from error


def read_file(path: Path, name: str) -> bytes:
    """A file of a checkpoint, which is no FIFO and no device. Raises DamagedCheckpoint."""
    try:
        return read_regular(path / name)
    except OSError as error:
        raise DamagedCheckpoint(path, name, str(error.strerror)) from error
