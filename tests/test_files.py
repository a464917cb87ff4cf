"""Files appear whole or not at all, also where a file system refuses a part of the work.

Each refusal is tried by substitution, with the errors that file systems give; `test_mounted.py` mounts one.
"""

import errno
import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from latentcodec import files
from latentcodec.files import (
    FileSystemWarning,
    make_durable,
    move_folder,
    open_regular,
    write_files,
    write_new,
    write_whole,
)
from latentcodec.printable import printable

REFUSALS = [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES]


@pytest.fixture(autouse=True)
def nothing_said():
    files._said.clear()


def refusing(monkeypatch, name, number, only=lambda *_: True):
    """Let `os.name` fail with `number` wherever `only` says so."""
    original = getattr(os, name)

    def refuse(*arguments, **options):
        if only(*arguments):
            raise OSError(number, os.strerror(number))
        return original(*arguments, **options)

    monkeypatch.setattr(os, name, refuse)


def killed(*arguments):
    raise KeyboardInterrupt


def write_all(folder):
    for i in range(3):
        write_whole(folder / str(i), b"content")


def is_folder(descriptor, *_):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize("number", REFUSALS)
def test_a_file_system_that_flushes_no_folder_costs_one_warning(number, tmp_path, monkeypatch):
    refusing(monkeypatch, "fsync", number, is_folder)
    with pytest.warns(FileSystemWarning, match="flushes no folder") as caught:
        write_all(tmp_path)
    assert len(caught) == 1
    assert [(tmp_path / str(i)).read_bytes() for i in range(3)] == [b"content"] * 3


def test_a_folder_that_cannot_be_opened_is_not_flushed(tmp_path, monkeypatch):
    refusing(monkeypatch, "open", errno.EACCES, lambda path, *_: os.path.isdir(path))
    with pytest.warns(FileSystemWarning, match="flushes no folder"):
        write_whole(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


@pytest.mark.parametrize("number", REFUSALS)
def test_a_file_system_that_flushes_no_file_costs_one_warning(number, tmp_path, monkeypatch):
    refusing(monkeypatch, "fsync", number)
    with pytest.warns(FileSystemWarning, match="flush") as caught:
        write_all(tmp_path)
    assert len(caught) == 2  # of files and of folders
    assert (tmp_path / "0").read_bytes() == b"content"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_an_error_stays_an_error_and_leaves_what_was_there(what, number, tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"before")
    refusing(monkeypatch, what, number)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_whole(tmp_path / "a", b"after")
    assert caught.value.filename == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


@pytest.mark.parametrize("number", [*REFUSALS, errno.EXDEV, errno.EBUSY, errno.EEXIST])
def test_where_no_file_is_renamed_it_is_copied_and_that_is_said(number, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"before")
    refusing(monkeypatch, "replace", number)
    with pytest.warns(FileSystemWarning, match="renames no file"):
        write_whole(tmp_path / "a", b"content")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"content"}


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_without_hard_links_a_new_file_is_whole_or_not_there(number, tmp_path, monkeypatch):
    refusing(monkeypatch, "link", number)
    with monkeypatch.context() as killing:
        for module, name in ((os, "replace"), (files, "_copy_over")):
            killing.setattr(module, name, killed)
        with pytest.warns(FileSystemWarning, match="no hard links"), pytest.raises(KeyboardInterrupt):
            write_new(tmp_path / "a", b"content")
    assert not list(tmp_path.iterdir())
    assert write_new(tmp_path / "a", b"content")
    assert not write_new(tmp_path / "a", b"another")  # though the link is refused for another reason
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"content"}


def test_a_link_to_nothing_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "store").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match=r"a link to nothing, where a folder belongs: '.*/store'"):
        write_new(tmp_path / "store/plan/a", b"content")


@pytest.mark.parametrize("number", [*REFUSALS, errno.EXDEV, errno.EMFILE])
def test_where_no_folder_is_renamed_it_is_filled_its_last_file_last(number, tmp_path, monkeypatch):
    source = tmp_path / ".new"
    write_files(source, {"a": b"1", "b": b"2", "z": b"3"}, last="a")
    order = []
    move = files.move_file
    monkeypatch.setattr(files, "move_file", lambda old, new: (order.append(new.name), move(old, new)))
    refusing(monkeypatch, "rename", number)
    with pytest.warns(FileSystemWarning, match="renames no folder"):
        move_folder(source, tmp_path / "new", last="a")
    assert sorted(order[:2]) == ["b", "z"]
    assert order[2:] == ["a"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == {
        "a": b"1",
        "b": b"2",
        "z": b"3",
    }
    assert not source.exists()


def test_a_folder_is_never_moved_into_another(tmp_path):
    write_files(tmp_path / "old", {"a": b"1"}, last="a")
    write_files(tmp_path / "new", {"b": b"2"}, last="b")
    with pytest.raises(OSError, match=r"not empty|exists"):
        move_folder(tmp_path / "new", tmp_path / "old", last="b")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["a"]


def test_what_is_written_is_flushed_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        events.append("folder" if is_folder(descriptor) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("name"), replace(*paths)))
    write_whole(tmp_path / "a", b"content")
    assert events == ["file", "name", "folder"]
    events.clear()
    write_whole(tmp_path / "b", b"content", durable=False)
    assert events == ["name"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_several_files_follow_the_umask_and_leave_no_litter(mask, tmp_path):
    earlier = os.umask(mask)
    try:
        write_files(tmp_path / "new", {"a": b"1", "b": b"2"}, last="b")
    finally:
        os.umask(earlier)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a", "b"}
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask for path in (tmp_path / "new").iterdir())


def test_files_that_cannot_all_be_written_leave_what_was_there(tmp_path, monkeypatch):
    write_files(tmp_path, {"a": b"1", "b": b"1"}, last="b")
    write = files.write_file

    def full(path, content, durable=True):
        if path.name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content, durable)

    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        write_files(tmp_path, {"a": b"2", "b": b"2"}, last="b")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"1"}


def _write(folder, number, barrier):
    content = bytes([number]) * 100_000
    barrier.wait()
    for _ in range(20):
        write_files(folder, {"a": content, "b": content, "c": content}, last="c")


def test_processes_that_write_at_once_leave_the_files_of_one_of_them(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    writers = [context.Process(target=_write, args=(tmp_path, i, barrier)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_stopped_process_does_not_hold_a_folder_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    writes_too_long = pytest.raises(TimeoutError, match="another process has been writing to this folder")
    with files.locked(tmp_path), writes_too_long:
        write_files(tmp_path, {"a": b"1"}, last="a")
    assert list(tmp_path.iterdir()) == []
    write_files(tmp_path, {"a": b"1"}, last="a")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from latentcodec import files\n"
        "files.move_file = lambda *_: os.kill(os.getpid(), 9)\n"
        "files.write_files(Path(sys.argv[1]), {'a': b'1'}, last='a')"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=False)
    assert len(list(tmp_path.glob(".incomplete-*"))) == 1
    here = platform.node()
    names = [f".incomplete-{os.getppid()}-{here}.tmp", f".incomplete-{os.getppid()}-elsewhere.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    write_files(tmp_path, {"b": b"2"}, last="b")
    assert {path.name for path in tmp_path.iterdir()} == {"b", *names}
    os.utime(tmp_path / names[1], (0, 0))  # another machine's, untouched for more than a day
    write_files(tmp_path, {"b": b"3"}, last="b")
    assert {path.name for path in tmp_path.iterdir()} == {"b", names[0]}


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"content")
    for path, words in {tmp_path / "fifo": "FIFO", "/dev/zero": "device", tmp_path: "directory"}.items():
        with pytest.raises(OSError, match=words):
            open_regular(path)
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"


def test_without_fcntl_files_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    write_files(tmp_path, {"a": b"1"}, last="a")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_what_moves_a_terminal_is_written_as_an_escape():
    assert printable("a\x1b[2Jb\rc\u202ed\x00\udcff") == r"a\x1b[2Jb\rc\u202ed\x00\udcff"
    assert printable("a\nb\tc: käse 日本\u3000👩\u200d👩") == "a\nb\tc: käse 日本\u3000👩\u200d👩"


def test_a_missing_folder_is_no_reason_to_fail_flushing(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        make_durable(Path(tmp_path / "nowhere"))
