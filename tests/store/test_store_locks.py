"""Locks of ranks while others take them away, look at them or are killed, and which leftovers are another machine's."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from stores import at_once, in_process

from latentcodec import leftovers
from latentcodec.leftovers import is_leftover, unfinished_name
from latentcodec.store import StoreError
from latentcodec.store.format import LOCKS
from latentcodec.store.locks import rank_lock, remove_stale_locks


def test_ranks_begin_and_end_while_others_take_the_folder_of_locks_away(tmp_path):
    """Real processes; the exception of `mkdir` came in one of a thousand begins."""

    def begin_and_end(rank):
        for _ in range(200):
            with rank_lock(tmp_path, rank, 3):
                pass
            remove_stale_locks(tmp_path)

    assert at_once([partial(begin_and_end, rank) for rank in range(3)]) == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reappears", [False, True])
def test_a_folder_of_locks_that_vanishes_while_it_is_made(tmp_path, monkeypatch, reappears):
    mkdir, times = Path.mkdir, []

    def disturbed(path, *arguments, **options):
        if path.name == LOCKS and len(times) < 3:
            times.append(1)
            if reappears:
                mkdir(path, parents=True, exist_ok=True)
            raise FileExistsError(path)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", disturbed)
    with rank_lock(tmp_path, 0, 2):
        (tmp_path / LOCKS / "1-of-2").touch()  # of a process that was killed
        assert in_process(remove_stale_locks, tmp_path) == 0
        assert [path.name for path in (tmp_path / LOCKS).iterdir()] == ["0-of-2"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_of_locks_is_named(tmp_path):
    (tmp_path / LOCKS).touch()
    with pytest.raises(FileExistsError, match=LOCKS), rank_lock(tmp_path, 0, 1):
        pass


def test_workers_of_a_killed_process_do_not_hold_its_rank(tmp_path):
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from latentcodec.store.locks import rank_lock\n"
        "with rank_lock(Path(sys.argv[1]), 0, 1):\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(60)\n"
        "    print(os.getpid(), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], start_new_session=True)
    try:
        assert process.wait() == -signal.SIGKILL
        with rank_lock(tmp_path, 0, 1):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_rank_is_not_refused_for_a_look_at_its_lock(tmp_path):
    path = tmp_path / LOCKS / "0-of-1"
    path.parent.mkdir()
    script = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+b'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print(flush=True); time.sleep(float(sys.argv[2]))"
    )

    def held(seconds):
        process = subprocess.Popen([sys.executable, "-c", script, path, str(seconds)], stdout=subprocess.PIPE)
        process.stdout.readline()
        return process

    with held(0.1), rank_lock(tmp_path, 0, 1):
        pass
    path.parent.mkdir(exist_ok=True)
    with held(60) as process:
        with pytest.raises(StoreError, match="another process is encoding"), rank_lock(tmp_path, 0, 1):
            pass
        process.kill()


def test_processes_with_numbers_of_their_own_are_another_machine(tmp_path, monkeypatch):
    path = tmp_path / unfinished_name()
    path.touch()
    assert not is_leftover(path)
    name = leftovers.this_machine()
    if sys.platform == "linux":
        assert name.endswith(os.readlink("/proc/self/ns/pid").removeprefix("pid:[").removesuffix("]"))
    monkeypatch.setattr(leftovers, "this_machine", lambda: f"{name}0")
    assert not is_leftover(path)  # of whoever it is, it may be alive
    os.utime(path, (0, 0))
    assert is_leftover(path)
    monkeypatch.undo()
    path.rename(path.with_name(path.name.replace(f"-{os.getpid()}-", "-4194304-")))
    assert is_leftover(next(tmp_path.iterdir()))
