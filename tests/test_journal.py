"""The diary of a run on a disk that is full, and after a kill: nothing half written stays, no checkpoint is harmed."""

import contextlib

import pytest
import torch
from small_runs import metrics, small, start, train, write_images
from test_checkpoint import small_disk

from latentcodec.training import checkpoint


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def fill(disk):
    """Take every byte that is left of a file system."""
    with (disk / "other.bin").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def draw_samples(trainer):
    trainer.journal.samples(trainer.step, [(torch.zeros(3, 32, 32), torch.zeros(3, 32, 32))])


@pytest.mark.parametrize(
    ("write", "name"),
    [(draw_samples, "samples/step-00000003.png"), (train, "metrics.jsonl")],  # with as many lines as it takes
)
def test_a_full_disk_is_an_error_that_names_file_and_bytes_and_harms_no_checkpoint(
    tmp_path, images, write, name
):
    output = tmp_path / "run"
    output.mkdir()
    config = small(output, images, max_steps=20, checkpoint_every=20, validate_every=0)
    with small_disk(output, size=8 * 2**20):
        trainer = start(config)
        train(trainer, kill_at=3)
        trainer.checkpoint()
        fill(output)
        with pytest.raises(OSError, match=r"it needs [\d,]+ bytes: No space left .* untouched") as refusal:
            write(trainer)
        assert str(refusal.value).startswith(f"{output / name} cannot be written")
        assert not list(output.rglob("*.tmp"))
        assert checkpoint.newest(output / "checkpoints").step == 3
        (output / "other.bin").unlink()
        train(start(config))
        assert [line["step"] for line in metrics(output) if "total" in line] == [*range(1, 21)]


def test_a_start_clears_what_a_kill_left_half_written(tmp_path, images):
    config = small(tmp_path / "run", images)
    for folder in (tmp_path / "run", tmp_path / "run/samples"):
        folder.mkdir()
        (folder / ".0123456789abcdef.tmp").write_text("hal")
    start(config)
    assert not list((tmp_path / "run").rglob("*.tmp"))
