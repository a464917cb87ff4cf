"""Bad files do not stop the training stream, hopeless sets end it in words, and its workers end with the trainer."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from image_sets import config_of, numbers_in, read, write_bad_files, write_folder

from latentcodec.sources.encoded import SourceFailed
from latentcodec.training.data import crops
from latentcodec.training.data.stream import Batches

# The tests ask for more workers than a small machine has cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


# ---- bad files ----


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


def test_a_hopeless_set_is_given_up_before_it_is_read_through(tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "PATIENCE_IMAGES", 3)
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^3 images in a row"):
        read(config_of(tmp_path), steps=1)


# ---- workers ----


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
