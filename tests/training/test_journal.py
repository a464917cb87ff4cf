"""The diary of a run on a disk that is full, and after a kill: nothing half written stays, no checkpoint is harmed."""

import contextlib
import json
import os
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from small_disk import small_disk
from small_runs import metrics, reset, small, start, train, write_images

from latentcodec.quality.metrics import Evaluation, Score
from latentcodec.training import checkpoint
from latentcodec.training.data.crops import Reject
from latentcodec.training.journal import Journal


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def fill(disk):
    """Take every byte that is left of a file system."""
    with (disk / "other.bin").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def draw_samples(trainer):
    trainer.journal.samples(trainer.state.step, [(torch.zeros(3, 32, 32), torch.zeros(3, 32, 32))])


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


@pytest.mark.parametrize("drawn", ["pictures", "digits"])
def test_a_card_says_which_built_in_set_was_trained_on(tmp_path, drawn):
    config = small(tmp_path, tmp_path)
    config = replace(config, data=replace(config.data, path=None, drawn=drawn))
    card = Journal(tmp_path, Accelerator(), config).card(9, 60.0, None)
    assert f"1 minutes, on: the built-in drawn {drawn}\n" in card


def test_a_card_says_how_much_of_each_image_was_judged(tmp_path):
    config = small(tmp_path, tmp_path)
    config = replace(config, data=replace(config.data, val_resolution=48))
    evaluation = Evaluation([Score(30.0, 0.9, float("nan"))])
    card = Journal(tmp_path, Accelerator(), config).card(9, 60.0, evaluation)
    assert "(posterior mode, the middle of each, at most 48 x 48 pixels, 8 bits)" in card


def test_a_start_clears_what_a_kill_left_half_written(tmp_path, images):
    config = small(tmp_path / "run", images)
    for folder in (tmp_path / "run", tmp_path / "run/samples"):
        folder.mkdir()
        (folder / ".0123456789abcdef.tmp").write_text("hal")
    start(config)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_the_settings_that_are_kept_are_those_that_the_steps_were_taken_with(tmp_path, images):
    """And not those of a start in between that ended before its first checkpoint."""
    config = small(tmp_path / "run", images, validate_every=0)
    train(start(config), stop_at=2)
    used = (tmp_path / "run/config.yaml").read_bytes()
    assert not list((tmp_path / "run").glob("config.until*"))
    for lr in (2e-3, 3e-3):
        start(replace(config, train=replace(config.train, lr=lr)))
        assert (tmp_path / "run/config.until-step-00000002.yaml").read_bytes() == used


def new_journal(output):
    reset()
    return Journal(output, Accelerator(cpu=True), small(output, output))


def test_a_file_name_that_is_not_utf_8_is_listed_once_and_ends_nothing(tmp_path, capsys):
    reject = Reject(os.fsdecode(b"caf\xe9.png"), "broken")
    for _ in range(2):  # the second time after a resume
        journal = new_journal(tmp_path)
        journal.begin(0, 0, complete=False)
        journal.rejected([reject])
    (line,) = (tmp_path / "rejects.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line) == {"path": "caf\\udce9.png", "reason": "broken"}
    capsys.readouterr().out.encode()


@pytest.mark.parametrize("damage", [bytes(7) + b"\n", b"\xff\n", b'{"step": 3, "to\n', b"3\n"])
def test_a_damaged_end_of_the_diary_is_dropped_and_said(tmp_path, capsys, damage):
    good = b'{"step": 1, "total": 0.5}\n{"step": 2, "total": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + damage + b'{"step": 9, "total": 0.5}\n')
    new_journal(tmp_path).begin(4, 4, complete=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == good
    assert "metrics.jsonl: the end is damaged and was dropped, from line 3 on" in capsys.readouterr().out


def test_damage_in_the_middle_of_the_diary_is_named_and_nothing_is_lost(tmp_path):
    content = b'{"step": 1, "total": 0.5}\n\0\0\n{"step": 3, "total": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        new_journal(tmp_path).begin(4, 4, complete=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content
