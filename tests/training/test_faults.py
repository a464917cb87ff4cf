"""A run says which images it leaves out and which are gone, and nothing that is not finite is kept."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import small, start, write_config, write_images

from latentcodec.finite import NotFinite
from latentcodec.training.data.images import held_out, open_images
from latentcodec.training.journal import Journal
from latentcodec.training.loop import main


def test_what_is_left_out_is_counted_by_reason_at_start_and_end_and_listed(tmp_path, capsys):
    folder = write_images(tmp_path / "set")
    for name in ("a.jp2", "b.jp2", "c.psd"):
        (folder / name).touch()
    os.mkfifo(folder / "d.png")
    sound = (folder / "00.png").read_bytes()
    (folder / "e.png").write_bytes(sound[:-12])
    config = small(tmp_path / "run", folder, max_steps=4, batch_size=4)
    assert main(["--config", str(write_config(config, tmp_path / "run.yaml"))]) == 3
    said = capsys.readouterr().out
    convert = "files are not read; convert them)"
    reasons = f"left out: 2 (.jp2 {convert}, 1 (.psd {convert}, 1 (a FIFO"
    assert said.count(reasons) == 2
    assert f"used, though broken: {folder / 'e.png'}: no end marker" in said
    assert "used, though something beside the pixels is broken: 1 images" in said
    rejects = [json.loads(line) for line in (tmp_path / "run/rejects.jsonl").read_text().splitlines()]
    assert sorted(Path(line["path"]).name for line in rejects) == ["a.jp2", "b.jp2", "c.psd", "d.png"]


def test_images_too_small_for_a_score_are_not_validated_on(tmp_path, capsys):
    folder = write_images(tmp_path / "set", count=10)
    write_images(tmp_path / "small", count=6, side=8)
    for file in (tmp_path / "small").iterdir():
        file.rename(folder / f"small{file.name}")
    trainer = start(small(tmp_path / "run", folder, max_steps=1))
    settings = replace(trainer.config.data, val_images=8)
    found = held_out(open_images(settings, 3, 0), 11)
    assert len(found.images) + len(found.too_small) == 8
    assert found.too_small
    assert found.rejects == []
    with pytest.raises(ValueError, match="all 6 validation images are smaller than 11 pixels a side"):
        held_out(open_images(replace(settings, val_path=str(write_images(tmp_path / "v", 6, 8))), 3, 0), 11)


def test_images_that_are_gone_in_mid_run_are_a_failure_and_no_wrong_setting(tmp_path, monkeypatch, capsys):
    """As on a disk that was taken away: whoever starts runs again after code 1 goes on when it is back."""
    folder, log = write_images(tmp_path / "set"), Journal.log

    def take_away(journal, step, *rest):
        log(journal, step, *rest)
        shutil.rmtree(folder, ignore_errors=True)

    monkeypatch.setattr(Journal, "log", take_away)
    config = small(tmp_path / "run", folder, max_steps=4, validate_every=0)
    assert main(["--config", str(write_config(config, tmp_path / "run.yaml"))]) == 1
    assert "error: 10 images in a row cannot be read" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_in_no_checkpoint(tmp_path, images):
    trainer = start(small(tmp_path, images))
    before = sorted((tmp_path / "checkpoints").iterdir())
    with torch.no_grad():
        trainer.state.codec.vae.decoder.conv_in.weight[0, 0, 0, 0] = math.nan
    trainer.state.step += 1
    with pytest.raises(NotFinite, match=r"step 1 is not saved.*conv_in\.weight"):
        trainer.checkpoint()
    assert sorted((tmp_path / "checkpoints").iterdir()) == before


def test_a_last_step_to_weights_that_are_not_finite_fails_and_saves_no_codec(
    tmp_path, images, monkeypatch, capsys
):
    config = small(tmp_path / "run", images, max_steps=2, checkpoint_every=100, validate_every=100)
    monkeypatch.setattr("latentcodec.training.state.learning_rate", lambda *_: math.inf)
    assert main(["--config", str(write_config(config, tmp_path / "run.yaml"))]) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "codec").exists()
    assert not (tmp_path / "run" / "result.json").exists()
