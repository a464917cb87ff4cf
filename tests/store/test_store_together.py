"""Several processes on one store, each at the worst moment for the others: to add, drop and finish, or to be killed."""

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from stores import SMALL, digest, in_process, make, write_pictures

from latentcodec import files
from latentcodec.store import LatentStore, StoreError, encode, finish, finishing, job, prepare, verify


@pytest.fixture
def photos(tmp_path):
    return write_pictures(tmp_path / "photos", 6)


@pytest.fixture
def store(photos, tmp_path, codec):
    """Six pictures in shards of four and two."""
    make(photos, tmp_path / "store", codec)
    return tmp_path / "store"


def ids(store):
    return sorted(item.id for item in LatentStore(store))


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
