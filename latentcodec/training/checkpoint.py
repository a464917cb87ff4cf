"""Checkpoints that a kill at any instant cannot spoil: committed whole or not at all, verified before use.

A checkpoint is a folder `step-00000042/` with one `<name>.safetensors` for each group of tensors, one `<name>.pt` for
each other object (an optimizer's state), `state.json`, and `manifest.json`: the size and the SHA-256 of every file.
`save` builds it in a hidden folder, makes every file and then the folder durable, gives it its name in one rename, and
removes older ones only after that. A committed folder is never written to again: saving the same step once more makes
`step-00000042.1`, which counts as newer.

`make_folder`, `prepare` and `save` are for the main process alone; every process may call `newest` and `read`. What a
checkpoint holds is the trainer's business: this file knows no model, no optimizer and no configuration.
"""

import errno
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from latentcodec.files import make_durable, move_folder, write_file
from latentcodec.training.manifest import (
    MANIFEST,
    STATE,
    CheckpointError,
    CheckpointWarning,
    DamagedCheckpoint,
    entry_of,
    read_file,
    verify,
)

COMMITTED = re.compile(r"step-(\d{8,})(?:\.(\d+))?")  # the step, and the attempt if it was saved again
UNCOMMITTED = ".tmp-"  # the prefix of folders that are being built or taken down: litter after a kill


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file has been verified; made by `newest` and `read`."""

    path: Path
    state: dict[str, Any]
    """What `save` was given as `state`, after a trip through JSON (tuples become lists), and the step."""

    @property
    def step(self) -> int:
        """The step it was saved at."""
        return int(self.state["step"])

    def has(self, name: str) -> bool:
        """Whether something was saved under `name`."""
        return any((self.path / f"{name}.{suffix}").exists() for suffix in ("safetensors", "pt"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The group of tensors saved under `name`, contiguous, on the CPU."""
        return safetensors.torch.load_file(self.path / f"{name}.safetensors")

    def object(self, name: str) -> Any:
        """The object saved under `name`, its tensors on the CPU."""
        return torch.load(self.path / f"{name}.pt", map_location="cpu", weights_only=True)

    def require_same(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Refuse to resume with another architecture or other settings, before anything has been loaded.

        `tensors` holds the present weights under the names that `save` knew them by: keys and shapes must be
        equal. `state` holds the entries of the saved state that must not have changed, such as
        `{"model": asdict(config.model)}`. Raises ValueError with each key that differs and both its values.
        """
        saved = {key: self.state[key] for key in state if key in self.state}
        differences = list(_differences(saved, json.loads(_json_bytes(state))))
        for name, group in tensors.items():
            shapes = {key: list(value.shape) for key, value in group.items()}
            differences += _differences(self._shapes(name), shapes, name)
        if differences:
            shown = differences[:10] + [f"... and {len(differences) - 10} more"] * (len(differences) > 10)
            raise ValueError(
                f"the checkpoint {self.path} is of another run:\n  "
                + "\n  ".join(shown)
                + f"\nTo resume it, go back to the configuration in {self.path / STATE}; "
                "to train this configuration, choose another output folder."
            )

    def _shapes(self, name: str) -> dict[str, list[int]]:
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            return {}
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def make_folder(folder: Path) -> None:
    """Create the folder of the checkpoints. Raises CheckpointError, with the file that is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = f"{there} is a file, not a folder" if is_file else error.strerror
        raise CheckpointError(error.errno, f"no checkpoints can be kept in {folder}: {reason}") from error


def prepare(folder: Path) -> None:
    """Create the folder and remove what killed runs left half built in it: with the run's lock, or it is not theirs."""
    make_folder(folder)
    for litter in folder.glob(f"{UNCOMMITTED}*"):
        _remove(litter)


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    objects: Mapping[str, Any],
    state: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Commit a checkpoint, then remove all but the `keep_last` newest that verify. Returns its folder.

    `tensors` maps a group's name to its tensors, `objects` a name to anything that `torch.load` accepts with
    `weights_only=True`, `state` is JSON. `folder` must exist (`prepare`): a vanished one is not made anew, it
    may be a disk that is gone. Raises CheckpointError, with the bytes needed, if anything cannot be written:
    the checkpoints that were there are untouched then, and nothing half built stays behind.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}: a run resumes from a checkpoint")
    contents: dict[str, Callable[[], bytes]] = {
        **{f"{name}.safetensors": partial(_tensor_bytes, group) for name, group in tensors.items()},
        **{f"{name}.pt": partial(_object_bytes, name, value) for name, value in objects.items()},
        STATE: partial(_json_bytes, {**state, "step": step}),
    }
    try:
        path = _commit(folder, step, contents)
    except OSError as error:
        needed = sum(len(serialise()) for serialise in contents.values())
        message = f"step {step} could not be saved in {folder}, it needs {needed:,} bytes: {error}"
        raise CheckpointError(error.errno, f"{message}. Older checkpoints are untouched.") from error
    prune(folder, path, keep_last)
    return path


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where none was ever committed.

    A damaged one is passed over with a CheckpointWarning that names it, the file and the reason. Raises
    CheckpointError if there are checkpoints and none can be used: a run is never silently begun again.
    """
    paths = _committed(folder)
    checkpoint = next(_verified(paths), None)
    if paths and checkpoint is None:
        names = ", ".join(path.name for path in paths)
        advice = "Bring one of them back from a copy, or delete the folder to begin the run anew."
        raise CheckpointError(errno.EBADMSG, f"no checkpoint in {folder} can be used: {names}. {advice}")
    return checkpoint


def read(path: Path) -> Checkpoint:
    """Verify the checkpoint in the folder `path`. Raises DamagedCheckpoint."""
    verify(path)
    state = json.loads(read_file(path, STATE))
    if COMMITTED.fullmatch(path.name) and _order(path)[0] != state["step"]:
        raise DamagedCheckpoint(path, STATE, f"saved at step {state['step']}; give the folder its name back")
    return Checkpoint(path, state)


# --- Writing ---


def _commit(folder: Path, step: int, contents: Mapping[str, Callable[[], bytes]]) -> Path:
    """Build the checkpoint under a hidden name, then give it its own."""
    path = _new_path(folder, step)
    unfinished = _hidden(path)
    try:
        unfinished.mkdir()
        manifest = {name: _write(unfinished / name, serialise()) for name, serialise in contents.items()}
        _write(unfinished / MANIFEST, _json_bytes(manifest))
        make_durable(unfinished)
        # The commit: before it there is no checkpoint, after it a whole one.
        move_folder(unfinished, path, MANIFEST)
        make_durable(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # after the rename there is nothing under this name
    return path


def _new_path(folder: Path, step: int) -> Path:
    attempts = [attempt for saved, attempt in map(_order, _committed(folder)) if saved == step]
    return folder / (f"step-{step:08d}" + (f".{max(attempts) + 1}" if attempts else ""))


def _hidden(path: Path) -> Path:
    return path.with_name(f"{UNCOMMITTED}{path.name}-{os.getpid()}")  # each run has its own


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file, durably and with the permissions that the umask allows; returns its manifest entry.

    The digest is that of the bytes in memory, so it also detects a disk that stored something else.
    """
    write_file(path, data)
    return entry_of(data)


# Files are serialised to memory and written by `_write`: the libraries' own writers turn a full disk into
# errors of theirs (RuntimeError, SafetensorError), and safetensors 0.8 ignores the umask (mode 0600).


def _tensor_bytes(group: Mapping[str, Tensor]) -> bytes:
    # safetensors takes contiguous tensors only, and convolution weights may be in channels_last.
    return safetensors.torch.save({key: value.detach().contiguous() for key, value in group.items()})


def _object_bytes(name: str, value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    # Better no checkpoint today than one that cannot be loaded next week.
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    if unsafe:
        raise ValueError(f"the object {name!r} holds {', '.join(unsafe)}: weights_only=True cannot load it")
    return buffer.getvalue()


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()


def prune(folder: Path, saved: Path, keep_last: int) -> None:
    """Remove all but the `keep_last` newest that verify, of which `saved` is the newest; later ones stay.

    A save does it; a resume does it again, for a kill may have come between.
    """
    older = [path for path in _committed(folder) if _order(path) < _order(saved)]
    kept = [checkpoint.path for checkpoint in islice(_verified(older), keep_last - 1)]
    for path in older:
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a folder; one that cannot be deleted stays, with a warning, and stops no training."""
    try:
        if COMMITTED.fullmatch(path.name):  # a kill must leave no half checkpoint under the name of a whole
            (path / MANIFEST).unlink(missing_ok=True)
            with suppress(OSError):  # some file systems rename no folder
                path = path.rename(_hidden(path))
        shutil.rmtree(path)
    except OSError as error:
        warnings.warn(f"{path} is not needed any more but stays: {error}", CheckpointWarning, stacklevel=3)


# --- Reading ---


def _committed(folder: Path) -> list[Path]:
    """The committed checkpoints, damaged ones included, newest first."""
    try:
        paths = [path for path in folder.iterdir() if COMMITTED.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(error.errno, f"cannot look for checkpoints in {folder}: {error}") from error
    return sorted(paths, key=_order, reverse=True)


def _order(path: Path) -> tuple[int, int]:
    """Step and attempt, from a committed folder's name."""
    step, _, attempt = path.name.removeprefix("step-").partition(".")
    return int(step), int(attempt or 0)


def _verified(paths: Iterable[Path]) -> Iterator[Checkpoint]:
    """Those that verify, one by one, with a warning for each of the others."""
    for path in paths:
        try:
            yield read(path)
        except DamagedCheckpoint as damage:
            warnings.warn(f"{damage.strerror}; it is passed over", CheckpointWarning, stacklevel=3)


def _differences(saved: Any, present: Any, key: str = "") -> Iterator[str]:
    """One line for each leaf that is not equal in two nested dictionaries."""
    if isinstance(saved, dict) and isinstance(present, dict):
        for name in dict.fromkeys([*saved, *present]):
            inner = f"{key}.{name}" if key else name
            yield from _differences(saved.get(name, "absent"), present.get(name, "absent"), inner)
    elif saved != present:
        yield f"{key}: {saved} in the checkpoint, {present} now"
