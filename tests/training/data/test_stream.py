"""The training stream: the same for all workers, ranks and restarts, and not stopped by bad files."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import (
    assert_same_stream,
    config_of,
    numbers_in,
    plain,
    read,
    write_bad_files,
    write_folder,
    write_photos,
    write_set,
)

from latentcodec.sources.encoded import EncodedSource, SourceFailed
from latentcodec.training.data import crops
from latentcodec.training.data.config import DataConfig
from latentcodec.training.data.crops import Cropping, CropStream
from latentcodec.training.data.images import held_out, open_images
from latentcodec.training.data.order import EpochOrder
from latentcodec.training.data.stream import Batches, training_batches

# The tests ask for more workers than a small machine has cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


# ------------------------------------------------------- the stream is a function of (seed, position)


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_stream_is_bit_identical_for_any_number_of_workers(tmp_path, workers):
    folder = write_photos(tmp_path / "photos", 11)
    (folder / "5.jpg").write_bytes(b"no image")
    for path, steps in ((folder, 9), (None, 3)):
        alone = read(config_of(path), steps=steps)
        assert_same_stream(read(config_of(path, workers=workers), steps=steps), alone)


def test_stream_started_in_the_middle_equals_the_rest(tmp_path):
    folder = write_photos(tmp_path / "photos", 11)
    whole = read(config_of(folder), steps=9, accumulation=3)
    for start in (1, 4, 8):  # 4 * 12 positions lie in the middle of the fifth epoch
        for workers in (0, 2):
            rest = read(config_of(folder, workers=workers), steps=9 - start, accumulation=3, start_step=start)
            assert_same_stream(rest, whole[3 * start :])


@pytest.mark.parametrize("buckets", [False, True])
def test_two_ranks_together_see_what_one_rank_sees(tmp_path, buckets):
    folder = write_photos(tmp_path / "photos", 11)
    config = config_of(folder, buckets=buckets, resolution=32)
    one = read(config, steps=5, batch_size=6, accumulation=2)
    ranks = [read(config, steps=5, batch_size=3, accumulation=2, rank=r, world_size=2) for r in (0, 1)]
    for batch, *parts in zip(one, *ranks, strict=True):
        assert torch.equal(batch["pixels"], torch.cat([part["pixels"] for part in parts]))
        assert torch.equal(batch["position"], torch.cat([part["position"] for part in parts]))


def test_accumulation_only_cuts_the_stream_into_smaller_pieces(tmp_path):
    folder = write_photos(tmp_path / "photos", 11)
    whole = read(config_of(folder), steps=4, batch_size=6)
    pieces = read(config_of(folder), steps=4, batch_size=2, accumulation=3)
    pixels = [torch.cat([batch["pixels"] for batch in batches]) for batches in (whole, pieces)]
    assert torch.equal(*pixels)


def test_seed_changes_order_and_crops(tmp_path):
    folder = write_photos(tmp_path / "photos", 11)
    first, second = (read(config_of(folder), steps=2, seed=seed) for seed in (0, 1))
    assert not torch.equal(first[0]["pixels"], second[0]["pixels"])


def test_an_image_is_cropped_anew_every_time(tmp_path):
    batches = read(config_of(write_photos(tmp_path / "photos", 1)), steps=3)
    crops = torch.cat([batch["pixels"] for batch in batches])
    assert len(crops.unique(dim=0)) == 12


def test_batches_are_what_the_trainer_expects(tmp_path):
    batch = read(config_of(write_photos(tmp_path / "photos", 5)), steps=1)[0]
    assert batch["pixels"].shape == (4, 3, 16, 16)
    assert batch["pixels"].dtype == torch.float32
    assert batch["pixels"].is_contiguous()
    assert -1 <= batch["pixels"].min() < batch["pixels"].max() <= 1
    assert batch["position"].dtype == torch.int64
    assert batch["position"].tolist() == [0, 1, 2, 3]
    assert batch["rejects"] == []


def test_every_image_is_seen_exactly_once_an_epoch_in_ever_new_order(tmp_path):
    folder = write_folder(tmp_path / "set", 30)
    seen = [
        number
        for batch in read(config_of(folder, workers=2), steps=15, batch_size=4)
        for number in numbers_in(batch)
    ]
    epochs = [seen[0:30], seen[30:60]]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(tmp_path, workers):
    folder = write_photos(tmp_path / "photos", 5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    read(config_of(folder, workers=workers), steps=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_stream_survives_pickling_as_spawned_workers_need_it(tmp_path, kind):
    images = open_images(config_of(write_set(tmp_path, kind, range(9)), val_images=2), 3, 0)
    stream = CropStream(images.source, EpochOrder(images.train, 16, 0), Cropping(0, 0.5, True))
    expected = stream[[3, 4]]  # also fills whatever is filled on first use
    held_out(images)
    assert torch.equal(pickle.loads(pickle.dumps(stream))[[3, 4]]["pixels"], expected["pixels"])


def test_bucketed_batches_have_one_shape_a_step_and_fit_their_images(tmp_path):
    for name, size in {"wide": (60, 100), "tall": (100, 60), "square": (80, 80)}.items():
        for number in range(6):
            file = tmp_path / f"{name}{number}.png"
            file.write_bytes(plain({"wide": 1, "tall": 2, "square": 3}[name], size))
    (tmp_path / "bad.png").write_bytes(b"")
    images = open_images(config_of(tmp_path, buckets=True, resolution=128, workers=2), 3, 0)
    batches = list(training_batches(images, 2, accumulation=2, steps=12))
    shapes = {1: (96, 160), 2: (160, 96), 3: (128, 128)}
    for step in range(12):
        pair = batches[2 * step : 2 * step + 2]
        assert pair[0]["pixels"].shape == pair[1]["pixels"].shape
        for batch in pair:
            if not batch["rejects"]:
                assert {shapes[number] for number in numbers_in(batch)} == {tuple(batch["pixels"].shape[-2:])}
    assert len({batch["pixels"].shape for batch in batches}) == 3


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_files_are_listed_exactly_and_stop_nothing(tmp_path, workers):
    folder = write_folder(tmp_path / "set", 13)
    bad = write_bad_files(folder)
    batches = read(config_of(folder, workers=workers), steps=6)  # 24 images are one epoch
    assert all(batch["pixels"].shape == (4, 3, 16, 16) for batch in batches)
    complaints = {f"{path}: {reason}" for batch in batches for path, reason in batch["rejects"]}
    assert sorted(line.split(": ")[0] for line in complaints) == sorted(map(str, bad))
    assert all(len(line.split(": ", 1)[1]) > 5 for line in complaints), "each with its reason"
    assert {number for batch in batches for number in numbers_in(batch)} == set(range(13))


def test_a_bad_image_is_replaced_by_the_next_of_the_epoch(tmp_path):
    folder = write_folder(tmp_path / "set", 8)
    good = [number for batch in read(config_of(folder), steps=2) for number in numbers_in(batch)]
    for place in (2, 3, 7):  # two in a row, and the last of the epoch, whose next one is the first
        (folder / f"{good[place]:04}.png").write_bytes(b"")
    expected = list(good)
    expected[2] = expected[3] = good[4]
    expected[7] = good[0]
    assert [number for batch in read(config_of(folder), steps=2) for number in numbers_in(batch)] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_without_a_readable_image_ends_with_a_clear_error(tmp_path, workers):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^5 images in a row cannot be read.*\d\.png") as caught:
        read(config_of(tmp_path, workers=workers), steps=1)
    assert "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_ends_while_its_batch_is_read_is_said_as_torch_says_it(error):
    def loader():
        yield {"pixels": torch.zeros(1)}
        raise error

    batches = iter(Batches(loader()))
    next(batches)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker is gone"):
        next(batches)


@pytest.mark.parametrize(("workers", "failed"), [(0, True), (2, False)])
def test_a_set_fails_once_every_worker_has_read_of_it(workers, failed):
    """Until then a setting may be wrong, such as more data.workers than there are shards."""
    batches = iter(Batches(iter([{"pixels": torch.zeros(1)}, ValueError("no more")]), workers))
    next(batches)
    with pytest.raises(ValueError, match="no more") as caught:
        next(batches)
    assert isinstance(caught.value, SourceFailed) == failed


def test_a_hopeless_set_is_given_up_before_it_is_read_through(tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "PATIENCE_IMAGES", 3)
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^3 images in a row"):
        read(config_of(tmp_path), steps=1)


# ---------------------------------------------------------------- validation images


def test_held_out_images_never_appear_in_training(tmp_path):
    folder = write_folder(tmp_path / "set", 20)
    images = open_images(config_of(folder, val_images=5), 3, seed=1)
    seen = {number for batch in training_batches(images, 4, steps=10) for number in numbers_in(batch)}
    held = numbers_in({"pixels": torch.stack(held_out(images).images)})
    assert len(held) == 5
    assert sorted([*seen, *held]) == list(range(20))
    other = held_out(open_images(config_of(folder, val_images=5), 3, seed=2))
    assert numbers_in({"pixels": torch.stack(other.images)}) != held, "the seed chooses"


def test_validation_images_that_lie_inside_the_training_folder_are_not_trained_on(tmp_path):
    folder = write_folder(tmp_path / "set", 20)
    write_folder(folder / "val", 3)
    images = open_images(config_of(folder, val_path=str(tmp_path / "set/../set/val"), val_images=8), 3, 0)
    assert [Path(name).parent.name for name in held_out(images).names] == ["val"] * 3
    assert images.train.tolist() == list(range(3, 20)), "neither they nor the copies 0000.png to 0002.png"


def test_of_a_validation_folder_inside_the_training_folder_nothing_is_trained_on(tmp_path):
    """Not of the images either that are too many to be validated on."""
    folder = write_folder(tmp_path / "set", 20)
    (folder / "val").mkdir()
    for number in range(16, 20):
        (folder / f"{number:04}.png").rename(folder / f"val/{number}.png")
    images = open_images(config_of(folder, val_path=str(folder / "val"), val_images=1), 3, 0)
    assert [images.source.name(i) for i in images.train] == sorted(map(str, folder.glob("*.png")))
    same = open_images(config_of(folder, val_path=str(folder), val_images=1), 3, 0)
    assert len(same.train) == 19, "the set itself is no part of it"


@pytest.mark.parametrize("kind", ["parquet", "saved", "tar", "folder"])
def test_a_validation_image_is_not_trained_on_whatever_its_set_is_called(tmp_path, monkeypatch, kind):
    (tmp_path / "other").mkdir()
    other = write_set(tmp_path / "other", "folder", range(4))
    monkeypatch.chdir(tmp_path)
    path = write_set(tmp_path, kind, range(20)).relative_to(tmp_path)
    images = open_images(config_of(path, val_path=str(other), val_images=4), 3, 0)
    assert images.train.tolist() == list(range(4, 20))
    images = open_images(config_of(path, val_path=str(path.resolve()), val_images=4), 3, 0)
    assert len(images.train) == 16


def test_a_slice_of_the_training_split_is_not_trained_on(tmp_path):
    path = write_set(tmp_path, "parquet", range(20))
    images = open_images(config_of(path, val_split="train[:4]", val_images=4), 3, 0)
    assert images.train.tolist() == list(range(4, 20))


def test_only_images_as_long_as_a_validation_image_are_read_at_the_start(tmp_path, monkeypatch):
    cells = [{"bytes": plain(number) + bytes(number), "path": None} for number in range(20)]
    cells[7] = None
    path = write_set(tmp_path, "parquet", range(20), cells)
    read, content = [], EncodedSource.content
    monkeypatch.setattr(EncodedSource, "content", lambda self, i: read.append(i) or content(self, i))
    images = open_images(config_of(path, val_split="train[:1]", val_images=1), 3, 0)
    assert images.train.tolist() == list(range(1, 20))
    assert len(read) < 10


def test_the_headers_for_buckets_are_read_once(tmp_path, monkeypatch):
    read, size = [], EncodedSource.size
    monkeypatch.setattr(EncodedSource, "size", lambda self, i: read.append(i) or size(self, i))
    images = open_images(config_of(write_folder(tmp_path / "set", 5), buckets=True, resolution=32), 3, 0)
    for drawn in (True, False):
        list(training_batches(images, 2, steps=1, drawn=drawn))
    assert read == list(range(5))


def test_validation_images_of_their_own_are_the_same_for_every_seed(tmp_path):
    config = config_of(
        write_folder(tmp_path / "a", 3), val_path=str(write_folder(tmp_path / "b", 9)), val_images=3
    )
    names = [[Path(name).stem for name in held_out(open_images(config, 3, seed)).names] for seed in (0, 1)]
    assert names[0] == names[1] == ["0000", "0004", "0008"]


def test_validation_images_are_whole_up_to_their_largest_size(tmp_path):
    folder = write_folder(tmp_path / "set", 4, size=(50, 70))
    whole, cut = (
        held_out(open_images(config_of(folder, val_images=2, val_resolution=side), 3, 0)).images
        for side in (512, 60)
    )
    assert [image.shape for image in whole] == [(3, 50, 70)] * 2
    assert [image.shape for image in cut] == [(3, 50, 60)] * 2


def test_a_largest_size_of_validation_images_that_no_score_can_be_computed_on_is_refused(tmp_path):
    images = open_images(config_of(write_folder(tmp_path / "set", 4), val_images=2, val_resolution=10), 3, 0)
    with pytest.raises(ValueError, match=r"data\.val_resolution 10 leaves fewer than the 11 pixels"):
        held_out(images, 11)


def test_unreadable_validation_images_are_listed(tmp_path):
    folder = write_folder(tmp_path / "val", 3)
    (folder / "0001.png").write_bytes(b"")
    config = config_of(write_folder(tmp_path / "train", 3), val_path=str(folder), val_images=3)
    result = held_out(open_images(config, 3, 0))
    assert len(result.images) == 2
    assert len(result.rejects) == 1
    assert result.rejects[0].path.endswith("0001.png")
    for name in ("0000", "0002"):
        (folder / f"{name}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the validation images can be read.*0000\.png"):
        held_out(open_images(config, 3, 0))


def test_holding_everything_out_is_an_error(tmp_path):
    folder = write_folder(tmp_path / "set", 4)
    with pytest.raises(ValueError, match=r"set: of 4 images 4 are held out.*data.val_images"):
        open_images(config_of(folder, val_images=16), 3, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"streaming": True}, "data.streaming needs a data.path"),
        ({"streaming": True, "path": "x", "buckets": True}, "data.buckets"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


# ---------------------------------------------------------------- the loader


def test_only_the_wait_for_data_is_counted():
    def slow():
        for _ in range(3):
            time.sleep(0.02)
            yield {"pixels": torch.zeros(1), "position": torch.zeros(1), "rejects": []}

    batches = Batches(slow())
    for _ in batches:
        time.sleep(0.3)  # the trainer at work
    assert 0.06 <= batches.waited_seconds < 0.5


ORPHAN_SCRIPT = """
import sys
from latentcodec.training.data.config import DataConfig
from latentcodec.training.data.images import open_images
from latentcodec.training.data.stream import training_batches
images = open_images(DataConfig(workers=2, prefetch=1, resolution=16, val_images=0), 3, 0)
batches = iter(training_batches(images, 2))
next(batches)
import multiprocessing
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
for line in sys.stdin:
    for _ in range(8):
        batch = next(batches)
    print("still", batch["position"].tolist(), flush=True)
"""


@pytest.mark.slow
def test_workers_leave_signals_to_the_trainer_but_die_with_it():
    trainer = subprocess.Popen(
        [sys.executable, "-c", ORPHAN_SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with trainer:
        try:
            workers = [int(word) for word in trainer.stdout.readline().split()]
            assert len(workers) == 2
            for worker in workers:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                    os.kill(worker, number)
            trainer.stdin.write("more\n")
            trainer.stdin.flush()
            assert trainer.stdout.readline() == "still [16, 17]\n"
        finally:
            trainer.kill()
            trainer.wait()
    deadline = time.monotonic() + 4
    while any(Path(f"/proc/{worker}").exists() and not is_zombie(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its trainer by 4 seconds"
        time.sleep(0.05)


def is_zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_photographs_stream_without_a_complaint(photos):
    images = open_images(DataConfig(path=str(photos / "train"), workers=2, val_images=4), 3, 0)
    batches = list(training_batches(images, 16, steps=4))
    assert [batch["rejects"] for batch in batches] == [[]] * 4
    assert torch.stack([batch["pixels"] for batch in batches]).std() > 0.2
    assert len(held_out(images).images) == 4
