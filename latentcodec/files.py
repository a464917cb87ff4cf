"""Files that appear whole or not at all and survive a power cut, on file systems with habits too.

Network shares, buckets that are mounted as folders, containers' shared folders and Windows refuse some of what a disk
of Linux does: to flush a folder, to change permissions, to rename a file or a folder, to lock. What they refuse is
known here and nowhere else: the work is done in another way, and once in a process a warning says what is weaker. An
error that is none of theirs, such as a full disk, stays an error. What is in the files is the affair of others.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from latentcodec.leftovers import is_leftover, unfinished_name

# What file systems and Windows answer where they do not do something, as distinct from failing at it.
NOT_DONE_HERE = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY})
NOT_DONE_HERE |= {errno.EPERM, errno.EACCES, errno.EBADF, errno.EISDIR}
NO_LINK_HERE = NOT_DONE_HERE | {errno.EXDEV, errno.EMLINK}
NO_RENAME_HERE = NOT_DONE_HERE | {errno.EXDEV, errno.EMFILE, errno.EBUSY, errno.EEXIST, errno.ENOTEMPTY}
STAGED = "incomplete"  # the token of folders where files wait for their names
LOCK_SECONDS = 60.0  # to rename takes milliseconds; a process that holds the lock for so long has stopped
_said: set[str] = set()


class FileSystemWarning(UserWarning):
    """A file system does not do what a promise rests on; the message says which promise is weaker."""


def write_whole(path: Path, content: bytes, durable: bool = True) -> None:
    """Writes beside `path`, then renames: nobody sees half a file, and one that was there stays until then.

    Missing folders are made; permissions follow the umask. If `durable`, which costs some milliseconds, a power cut
    after the return takes nothing back. A killed process leaves at worst a hidden `.tmp` beside it, an error nothing.
    Raises `OSError` naming `path` where the disk refuses.
    """
    beside = path.parent / unfinished_name()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(beside, content, durable)
        move_file(beside, path)
    except OSError as error:  # of a full disk it names nothing, else the file beside
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # an interrupt leaves no litter either, unless nothing can be removed
            beside.unlink(missing_ok=True)
    if durable:
        make_durable(path.parent)


def write_new(path: Path, content: bytes) -> bool:
    """Writes as `write_whole` does, durably, but a file that is there already stays, and the answer is False.

    Raises `OSError` naming what stands where the folder belongs, or where the disk refuses.
    """
    beside = path.parent / unfinished_name()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(beside, content)
        try:
            os.link(beside, path)
        except OSError as error:
            if error.errno not in NO_LINK_HERE:
                raise
            _warn(
                path, f"has no hard links ({error.strerror}): without locks too a file can be written twice"
            )
            with locked(path.parent):
                if os.path.lexists(path):
                    return False
                move_file(beside, path)
    except FileExistsError as error:
        if not path.parent.is_dir():
            reason = "a file, or a link to nothing, where a folder belongs"
            raise NotADirectoryError(errno.ENOTDIR, reason, str(error.filename)) from error
        return False
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    make_durable(path.parent)
    return True


def write_file(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file under its own name, and flush it to the disk. Raises `OSError` where the disk refuses."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        if not durable:
            return
        try:
            os.fsync(file.fileno())
        except OSError as error:
            _warn_unless_failed(
                error, path, "does not flush files: a power cut may undo what was written last"
            )


def append_file(path: Path, content: bytes) -> None:
    """Add to the end of a file, which may not be there; where that is not done, the file is written anew."""
    try:
        with path.open("ab") as file:
            file.write(content)
    except OSError as error:
        if error.errno not in NOT_DONE_HERE or path.is_dir():
            raise
        _warn(path, f"appends to no file ({error.strerror}): each line costs writing the whole file")
        before = path.read_bytes() if path.exists() else b""
        write_whole(path, before + content, durable=False)


def move_file(source: Path, target: Path) -> None:
    """Give a file the name of another in one step; where no file is renamed, by a copy that is read back."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in NO_RENAME_HERE or target.is_dir():
            raise
        _copy_over(source, target, error)


def move_folder(source: Path, target: Path, last: str) -> None:
    """Give a folder a new name, which nothing has, in one step.

    Where no folder is renamed, its files are moved one by one, `last` at the end: a folder without that file is not
    finished. Raises `OSError` where the disk refuses.
    """
    try:
        os.rename(source, target)
        return
    except OSError as error:
        if error.errno not in NO_RENAME_HERE or not source.is_dir() or os.path.lexists(target):
            raise
        _warn(target, f"renames no folder ({error.strerror}): they are filled file by file, {last} last")
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == last):
        move_file(file, target / file.name)
    shutil.rmtree(source, ignore_errors=True)


def make_durable(path: Path) -> None:
    """Flush a folder's names to the disk, so that a power cut does not undo them; a no-op where that is not done."""
    if os.name == "nt":  # which opens no folder, and keeps names by its journal
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        _warn_unless_failed(error, path, "flushes no folder: a power cut may undo the last renames")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes that ask for it in this way; nobody where folders cannot be locked.

    Raises TimeoutError naming the folder where another process holds it for longer than `LOCK_SECONDS`.
    """
    try:
        import fcntl  # Windows has none

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        errno.ETIMEDOUT,
                        f"another process has been writing to this folder for {LOCK_SECONDS:.0f} s, or was stopped "
                        "while it did: end it and try again",
                        str(folder),
                    ) from None
                time.sleep(0.01)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def write_files(folder: Path, contents: Mapping[str, bytes], last: str) -> None:
    """Put files into `folder`, each whole or not at all; none takes its name before all are written and flushed.

    `last` takes its name at the end. Of several processes that write at once, one after the other does, so that all
    files are of one of them. Other files stay. Raises `OSError` where the disk refuses; what was there is untouched
    then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    staged = folder / unfinished_name(STAGED)
    staged.mkdir(exist_ok=True)
    try:
        for name, content in contents.items():
            write_file(staged / name, content)
        with locked(folder):
            for name in sorted(contents, key=lambda name: name == last):
                move_file(staged / name, folder / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    make_durable(folder)


def _remove_leftovers(folder: Path) -> None:
    """Removes what `write_files` left in `folder` when its process was killed."""
    for litter in folder.glob(f".{STAGED}-*"):
        if is_leftover(litter):
            shutil.rmtree(litter, ignore_errors=True)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file for reading, but no FIFO, device or socket, which may have no end or keep one waiting.

    Raises `OSError` with the reason.
    """
    binary, at_once = getattr(os, "O_BINARY", 0), getattr(os, "O_NONBLOCK", 0)  # a FIFO waits for a writer
    descriptor = os.open(path, os.O_RDONLY | binary | at_once)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, f"a {_kind(mode)}, not a file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: str | Path) -> None:
    """Raise `OSError` as `open_regular` does, for a file that a library will open by its name."""
    open_regular(path).close()


def read_regular(path: str | Path) -> bytes:
    """The bytes of a file; raises `OSError` as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def read_start(path: str | Path, count: int = 64) -> bytes:
    """The first bytes of a file; none where it is no file, or cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(count)
    except OSError:
        return b""


def _copy_over(source: Path, target: Path, refusal: OSError) -> None:
    """Replace `target` by the content of `source`, and read it back."""
    _warn(target, f"renames no file ({refusal.strerror}): one that is being written can be seen half done")
    content = source.read_bytes()
    with suppress(FileNotFoundError):
        target.unlink()  # some let files be written once only
    write_file(target, content)
    if target.read_bytes() != content:
        raise OSError(errno.EIO, "what was written is not what is read back", str(target))
    source.unlink(missing_ok=True)


def _warn_unless_failed(error: OSError, path: Path, habit: str) -> None:
    if error.errno not in NOT_DONE_HERE:
        raise OSError(error.errno, error.strerror, str(path)) from error
    _warn(path, habit)


def _warn(path: Path, habit: str) -> None:
    """Say once in a process what the file system of `path` does not do."""
    key = habit.partition("(")[0]
    if key not in _said:
        _said.add(key)
        warnings.warn(f"{path}: this file system {habit}", FileSystemWarning, stacklevel=4)


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "FIFO"
    return "socket" if stat.S_ISSOCK(mode) else "device"
