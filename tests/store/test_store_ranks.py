"""A store is the same however it came about: by how many ranks and workers, killed or not."""

import os
import resource
import signal
from functools import partial

import pytest
from image_sets import write_bad_files
from stores import SMALL, KilledAt, at_once, digest, in_process, make, write_pictures

from latentcodec.store import LatentStore, StoreError, encode, prepare, verify
from latentcodec.store.ranks import rank_and_world

pytestmark = pytest.mark.filterwarnings("default")  # of damaged EXIF data in the bad pictures


@pytest.fixture(scope="module")
def many(tmp_path_factory, codec):
    """A folder with some broken pictures, and the digest of the store that an undisturbed process makes of it."""
    folder = tmp_path_factory.mktemp("many")
    photos = write_pictures(folder / "photos", 14, sizes=((32, 32), (24, 40)), captions=True)
    write_bad_files(photos)
    make([photos], folder / "peace", codec)
    return photos, digest(folder / "peace")


def whole(photos, out, codec, rank=0, world=1, killed_at=None):
    if killed_at is not None:
        KilledAt(killed_at)
    prepare([str(photos)], out, codec, **SMALL)
    encode(out, codec, rank, world, workers=0)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_make_the_same_store(many, tmp_path, codec, world):
    photos, expected = many
    for rank in reversed(range(world)):
        assert in_process(whole, photos, tmp_path / "store", codec, rank, world) == 0
    assert digest(tmp_path / "store") == expected


def test_killed_before_every_file_operation_and_resumed_by_others(many, tmp_path, codec):
    photos, expected = many
    out = tmp_path / "store"
    for starts in range(100):  # rank 0 and 1 of 2 in turn, each killed one operation further on
        status = in_process(whole, photos, out, codec, starts % 2, 2, starts)
        assert status in (0, -signal.SIGKILL)
        if status == 0 and (out / "index.json").exists():
            break
    assert starts > 5
    whole(photos, out, codec)
    assert digest(out) == expected


def test_ranks_that_run_at_once(many, tmp_path, codec):
    photos, expected = many
    works = [partial(whole, photos, tmp_path / "store", codec, rank, 3) for rank in range(3)]
    assert at_once(works) == [0, 0, 0]
    assert digest(tmp_path / "store") == expected


def test_workers_change_nothing(many, tmp_path, codec):
    photos, expected = many
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    encode(tmp_path / "store", workers=2)
    assert digest(tmp_path / "store") == expected


def test_workers_need_no_file_and_no_shared_memory_for_each_picture(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 20)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL | dict(batch=20, shard_size=20))

    def work():
        signal.alarm(30)  # a batch that is lost is waited for
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 15,) * 2)
        encode(tmp_path / "store", codec, workers=1)

    assert in_process(work) == 0
    assert len(LatentStore(tmp_path / "store")) == 20


@pytest.mark.parametrize("error", [ValueError("rows: no such column"), PermissionError(13, "no", "rows")])
def test_an_error_in_a_worker_is_the_line_that_it_is_without_one(tmp_path, codec, monkeypatch, error):
    def refused(*arguments):
        raise error

    photos = write_pictures(tmp_path / "photos", 2)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    monkeypatch.setattr("latentcodec.store.decoding.decode", refused)
    for workers in (0, 1):
        with pytest.raises(type(error)) as raised:
            encode(tmp_path / "store", codec, workers=workers)
        assert str(raised.value) == str(error)


def test_ranks_of_launchers():
    assert rank_and_world({}) == (0, 1)
    assert rank_and_world({"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)
    srun = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    assert rank_and_world(srun) == (1, 2)
    assert rank_and_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == (0, 1)  # a script without srun
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert rank_and_world(array) == (2, 4)
    assert rank_and_world(array | srun) == (5, 8)
    steps = array | {"SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_ID": "11"}
    assert rank_and_world(steps) == (3, 4)
    for task in ("8", "13"):  # between two steps, and behind the last one
        with pytest.raises(ValueError, match=f"SLURM array task {task} has no place among 4 that start at 5"):
            rank_and_world(steps | {"SLURM_ARRAY_TASK_ID": task})
    for name, others in (("RANK", {"WORLD_SIZE": "2"}), ("SLURM_ARRAY_TASK_STEP", steps)):
        with pytest.raises(ValueError, match=f"^{name} in the environment is 'abc', not a number"):
            rank_and_world({**others, name: "abc"})
    for given, missing in (
        ("RANK", "WORLD_SIZE"),
        ("WORLD_SIZE", "RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ):
        with pytest.raises(ValueError, match=f"{given} is 2 and {missing} is not set"):
            rank_and_world({given: "2"})
        assert rank_and_world({given: "2"}, rank=1, world=3) == (1, 3)
    assert rank_and_world({"WORLD_SIZE": "1"}) == (0, 1)
    assert rank_and_world({"RANK": "1", "WORLD_SIZE": "4"}, rank=3) == (3, 4)


def test_two_encoders_on_one_store(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 5)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)

    def second(done, rejected):
        def work():
            with pytest.raises(StoreError, match=r"another process is encoding .* \(rank 0 of 1\)"):
                encode(tmp_path / "store", codec, workers=0)

        statuses.append(in_process(work))

    statuses = []
    encode(tmp_path / "store", codec, workers=0, progress=second)
    assert set(statuses) == {0}
    assert verify(tmp_path / "store").ok
