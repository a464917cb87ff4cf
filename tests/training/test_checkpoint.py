"""What a checkpoint saves and brings back, and how it is committed: durable, under its name, and old ones gone."""

import os
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from small_checkpoints import FILES, assert_whole, names, save_step, weights

from latentcodec.training.checkpoint import newest, prepare, read, save


def test_a_checkpoint_brings_back_what_was_saved(folder: Path):
    assert newest(folder) is None
    assert newest(folder / "missing") is None
    path = save_step(folder, 42)
    assert path == folder / "step-00000042"
    assert names(path) == sorted(FILES)
    assert_whole(newest(folder), 42)
    assert_whole(read(path), 42)


def test_only_the_last_ones_are_kept(folder: Path):
    for step in range(1, 6):
        save_step(folder, step, keep_last=3)
    assert names(folder) == ["step-00000003", "step-00000004", "step-00000005"]


def test_a_step_that_is_saved_again_counts_as_newer_every_time(folder: Path):
    for images_seen in range(4):
        save(folder, 7, tensors={}, objects={}, state={"images_seen": images_seen}, keep_last=1)
        checkpoint = newest(folder)
        assert checkpoint is not None
        assert checkpoint.state == {"images_seen": images_seen, "step": 7}
    assert len(names(folder)) == 1


def test_everything_is_durable_before_it_has_its_name_and_has_it_before_others_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    save_step(folder, 1)
    done = []

    def fsync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def rename(old: str | Path, new: str | Path) -> None:
        done.append(f"{Path(old).name} -> {Path(new).name}")
        real_rename(old, new)

    real_rename = os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save_step(folder, 2, keep_last=1)
    building, leaving = (f".tmp-step-0000000{step}-{os.getpid()}" for step in (2, 1))
    commit = f"{building} -> step-00000002"
    assert done == [*FILES, building, commit, "checkpoints", f"step-00000001 -> {leaving}"]


def test_permissions_follow_the_umask(folder: Path):
    for file_mode, folder_mode in [(0o644, 0o755), (0o640, 0o750), (0o664, 0o775)]:
        before = os.umask(0o777 - folder_mode)
        try:
            path = save_step(folder, 1)
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == folder_mode
        assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {file_mode}


def test_what_could_not_be_loaded_back_is_refused_when_it_is_saved(folder: Path):
    with pytest.raises(ValueError, match=r"'schedule'.*Fraction"):
        save(folder, 1, tensors={}, objects={"schedule": Fraction(1, 2)}, state={}, keep_last=1)
    with pytest.raises(ValueError, match="keep_last"):
        save(folder, 1, tensors={}, objects={}, state={}, keep_last=0)
    assert names(folder) == []


def test_another_architecture_is_refused_with_every_difference(folder: Path):
    save_step(folder, 1)
    checkpoint = newest(folder)
    assert checkpoint is not None
    checkpoint.require_same({"model": weights(9)}, {"model": {"channels": (4, 8)}})
    changed = {"conv.weight": torch.zeros(4, 1, 2, 2), "norm.bias": torch.zeros(4)}
    with pytest.raises(ValueError, match="another output folder") as refusal:
        checkpoint.require_same({"model": changed}, {"model": {"channels": (4, 8, 16), "act": "silu"}})
    for line in [
        str(checkpoint.path),
        "model.channels: [4, 8] in the checkpoint, [4, 8, 16] now",
        "model.act: absent in the checkpoint, silu now",
        "model.conv.weight: [4, 3, 2, 2] in the checkpoint, [4, 1, 2, 2] now",
        "model.conv.bias: [4] in the checkpoint, absent now",
        "model.norm.bias: absent in the checkpoint, [4] now",
    ]:
        assert line in str(refusal.value)


def test_prepare_removes_what_killed_runs_left_and_nothing_else(folder: Path):
    save_step(folder, 1)
    shutil.copytree(folder / "step-00000001", folder / ".tmp-step-00000002-4711")
    (folder / "notes.txt").write_text("mine")
    prepare(folder)
    assert names(folder) == ["notes.txt", "step-00000001"]
    assert_whole(newest(folder), 1)
