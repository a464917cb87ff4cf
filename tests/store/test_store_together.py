"""Several processes on one store, each at the worst moment for the others: to add, drop and finish, or to be killed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from stores import SMALL, at_once, digest, in_process, tiny_codec, write_pictures

from latentcodec import files, leftovers
from latentcodec.leftovers import is_leftover, unfinished_name
from latentcodec.store import LatentStore, StoreError, encode, finish, finishing, job, prepare, verify
from latentcodec.store.format import LOCKS
from latentcodec.store.locks import rank_lock, remove_stale_locks
from latentcodec.store.plan import Plan


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


@pytest.fixture
def photos(tmp_path):
    return write_pictures(tmp_path / "photos", 6)


@pytest.fixture
def store(photos, tmp_path, codec):
    """Six pictures in shards of four and two."""
    make(photos, tmp_path / "store", codec)
    return tmp_path / "store"


def make(photos, out, codec, **options):
    prepare([str(photos)], out, codec, **{**SMALL, **options})
    return encode(out, codec, workers=0)


def ids(store):
    return sorted(item.id for item in LatentStore(store))


# --- finishing


def before_the_index(monkeypatch, store, *works):
    """Lets other processes do these works, one before each time that an index is about to be written."""
    locked, left = finishing.locked, list(works)

    def at_last(folder):
        if left:
            assert in_process(left.pop(0)) == 0
        return locked(folder)

    monkeypatch.setattr(finishing, "locked", at_last)
    return left


def undisturbed(monkeypatch, work):
    """The work with the functions as they are, for a process that was forked while they are replaced."""

    def run():
        monkeypatch.undo()
        work()

    return run


def test_where_nothing_locks_two_may_write_the_index_at_once(store, monkeypatch):
    expected = digest(store)
    (store / "index.json").unlink()
    move_file, statuses = files.move_file, []

    def after_the_other(source, target):
        statuses.append(in_process(undisturbed(monkeypatch, without_locks)))
        move_file(source, target)

    def without_locks():
        finishing.locked = lambda folder: nullcontext()
        finish(store)

    monkeypatch.setattr(finishing, "locked", lambda folder: nullcontext())
    monkeypatch.setattr(files, "move_file", after_the_other)
    finish(store)
    assert statuses == [0, 0]  # rejects.jsonl and index.json
    assert digest(store) == expected


def test_a_drop_before_an_older_finish_writes_its_index_counts(store, monkeypatch):
    left = before_the_index(
        monkeypatch, store, undisturbed(monkeypatch, lambda: finish(store, drop=["005.png"]))
    )
    assert finish(store).items == 5
    assert not left
    assert ids(store) == [f"{n:03}.png" for n in range(5)]
    assert verify(store).ok


def test_of_two_drops_at_once_both_count(store, monkeypatch):
    drops = [["005.png"], ["004.png"]]
    works = [undisturbed(monkeypatch, lambda drop=drop: finish(store, drop=drop)) for drop in drops]
    before_the_index(monkeypatch, store, *works)  # the first even before this process has noted its own
    finish(store, drop=["000.png"])
    assert ids(store) == ["001.png", "002.png", "003.png"]
    assert len(json.loads((store / "dropped.json").read_text())) == 3
    assert verify(store).ok


def test_a_drop_is_noted_while_another_is(store, monkeypatch):
    read_drops = finishing._read_drops
    wait, go = os.pipe()
    child = os.fork()  # before the lock, which a fork would share
    if child == 0:
        os.read(wait, 1)
        finish(store, drop=["005.png"])
        os._exit(0)

    def then_comes_the_other(path):
        dropped = read_drops(path)
        os.write(go, b"1")
        time.sleep(0.5)  # in which the other waits, or would note its own
        return dropped

    monkeypatch.setattr(finishing, "_read_drops", then_comes_the_other)
    finish(store, drop=["000.png"])
    monkeypatch.undo()
    assert os.waitpid(child, 0)[1] == 0
    finish(store)
    assert ids(store) == ["001.png", "002.png", "003.png", "004.png"]


def test_a_finish_that_ends_late_keeps_what_was_added_meanwhile(store, photos, codec, monkeypatch):
    def add():
        write_pictures(photos, 4, first=6)
        make(photos, store, codec)

    before_the_index(monkeypatch, store, undisturbed(monkeypatch, add))
    assert finish(store).items == 10
    assert len(ids(store)) == 10


def test_a_rank_is_done_though_another_has_planned_more(photos, tmp_path, codec, monkeypatch):
    store = tmp_path / "store"
    prepare([str(photos)], store, codec, **SMALL)
    missing = job.missing_shards

    def plan_more():
        write_pictures(photos, 4, first=6)
        prepare([str(photos)], store, codec, **SMALL)

    def then_there_are_more(out, plan):
        found = missing(out, plan)
        if not found:
            assert in_process(undisturbed(monkeypatch, plan_more)) == 0
        return found

    monkeypatch.setattr(job, "missing_shards", then_there_are_more)
    assert encode(store, codec, workers=0).index is None
    monkeypatch.undo()
    assert encode(store, codec, workers=0).index.items == 10


def test_a_shard_of_equal_length_that_was_written_anew_is_read_anew(store, photos, codec):
    write_pictures(photos, 1, first=6)
    os.replace(photos / "006.png", photos / "000.png")
    shard = next(store.glob("shards/*/*00.arrow"))
    length = shard.stat().st_size
    shard.unlink()
    make(photos, store, codec)
    assert shard.stat().st_size == length
    assert verify(store).ok


def test_a_plan_that_was_made_anew_is_held_against_all_shards(store, photos, codec):
    for file in (store / "plan").iterdir():
        file.unlink()
    os.replace(photos / "005.png", photos / "000a.png")
    with pytest.raises(StoreError, match="holds other pictures than the plan gave this shard"):
        make(photos, store, codec)


# --- beginning


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


def test_ranks_of_machines_with_other_cores_encode_as_the_first_one_says(
    photos, tmp_path, codec, monkeypatch
):
    store = tmp_path / "store"
    first = prepare([str(photos)], tmp_path / "other", codec, **SMALL)
    write_new = job.write_new

    def too_late(path, content):
        write_new(path, first.parts[0].to_bytes())
        return write_new(path, content)

    monkeypatch.setattr(job, "write_new", too_late)
    plan = prepare([str(photos)], store, codec, **{**SMALL, "threads": 2})
    assert plan.parts[0].machine["threads"] == 1
    with pytest.raises(StoreError, match="other pictures, or with other settings"):
        prepare([str(photos)], tmp_path / "third", codec, **{**SMALL, "shard_size": 3})


# --- the codec of a store


def test_every_part_is_encoded_in_its_own_precision(store, photos, codec):
    write_pictures(photos, 4, first=6)
    with torch.no_grad():
        make(photos, store, codec, precision="bfloat16")
    expected = digest(store)
    next(store.glob("shards/*/*00.arrow")).unlink()
    encode(store, workers=0)
    assert [part.machine["precision"] for part in Plan.load(store).parts] == ["float32", "bfloat16"]
    assert digest(store) == expected


@pytest.mark.parametrize("harm", ["none", "no weights", "cut", "another", "no config"])
def test_the_codec_of_a_store_is_the_plans(photos, tmp_path, codec, harm):
    store = tmp_path / "store"
    prepare([str(photos)], store, codec, **SMALL)
    folder = store / "codec"
    weights = folder / "diffusion_pytorch_model.safetensors"
    if harm == "no weights":
        weights.unlink()
    elif harm == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif harm == "another":
        tiny_codec(seed=1).save_pretrained(folder)
    elif harm == "no config":
        (folder / "config.json").unlink()
    make(photos, store, codec)
    assert LatentStore(store).codec().fingerprint == codec.fingerprint


def test_another_codec_than_the_plans_is_kept_out(photos, tmp_path, codec):
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    with pytest.raises(StoreError, match="begun with"):
        prepare([str(photos)], tmp_path / "store", tiny_codec(seed=1), **SMALL)
    assert tmp_path.joinpath("store", "codec", "config.json").exists()
    encode(tmp_path / "store", workers=0)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["another codec", "a file"])
def test_the_codec_folder_of_somebody_else_is_left_alone(photos, tmp_path, codec, what):
    """As a training has one, in the folder of its run."""
    folder = tmp_path / "run/codec"
    if what == "a file":
        folder.parent.mkdir()
        folder.write_text("mine")
    else:
        tiny_codec(seed=1).save_pretrained(folder)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=r"run/codec: is there already.*--out.*--no-codec"):
        prepare([str(photos)], tmp_path / "run", codec, **SMALL)
    assert contents(tmp_path) == before
    prepare([str(photos)], tmp_path / "run", codec, **SMALL, keep_codec=False)
    assert encode(tmp_path / "run", codec, workers=0).index.items == 6


def test_this_codec_may_lie_there_before_the_store(photos, tmp_path, codec):
    codec.save_pretrained(tmp_path / "run/codec", card="mine")
    assert make(photos, tmp_path / "run", codec).index.items == 6
    assert (tmp_path / "run/codec/README.md").read_text() == "mine"


def test_a_damaged_codec_is_not_replaced_together_with_files_of_others(photos, store, codec):
    weights, note = (store / "codec" / name for name in ("diffusion_pytorch_model.safetensors", "note.txt"))
    weights.write_bytes(b"cut")
    note.write_text("mine")
    with pytest.raises(StoreError, match=r"codec/note\.txt: no file of a codec.*move"):
        make(photos, store, codec)
    assert note.read_text() == "mine"
    note.unlink()
    make(photos, store, codec)
    assert LatentStore(store).codec().fingerprint == codec.fingerprint


# --- names and places


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


def test_a_store_in_a_folder_whose_name_is_no_utf_8(photos, tmp_path, codec):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/st\xe9re")
    job = make(photos, Path(folder), codec)
    assert job.index.items == 6
    assert verify(folder).ok
    assert len(ids(Path(folder))) == 6


def test_a_decoding_worker_that_is_killed_is_named(photos, tmp_path, codec):
    store = tmp_path / "store"
    prepare([str(photos)], store, codec, **SMALL)

    def kill_workers(encoded, rejected):
        for worker in psutil.Process().children():
            worker.kill()
        time.sleep(0.2)

    with pytest.raises(ChildProcessError, match="--workers"):
        encode(store, codec, workers=1, progress=kill_workers)
    make(photos, store, codec)
    assert verify(store).ok
