"""A save that is killed or that fails at any of its operations, or for want of room or rights, loses nothing."""

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import start_child, status_of
from small_checkpoints import assert_whole, names, save_step
from small_disk import small_disk
from torch import nn

from latentcodec.training.checkpoint import CheckpointError, CheckpointWarning, newest, prepare, save

# ---- kills and failures inside a save ----


def at_operation(number: int, act: Callable[[], None]) -> None:
    """`act` just before file operation `number` from now on, fsync included. Children only: it stays."""
    watched = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "fsync"}
    operations = itertools.count(1)

    def before(event: str, *_: Any) -> None:
        if event in watched and next(operations) == number:
            act()

    fsync = os.fsync
    os.fsync = lambda descriptor: (before("fsync"), fsync(descriptor))[1]
    sys.addaudithook(before)


@pytest.mark.slow
@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_kill_at_any_operation_of_a_save_loses_nothing(folder: Path, keep_last: int):
    outcomes = []
    for operation in itertools.count(1):
        shutil.rmtree(folder)
        prepare(folder)
        for step in range(1, keep_last + 1):
            save_step(folder, step, keep_last)

        def killed_save(operation: int = operation) -> None:
            at_operation(operation, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save_step(folder, keep_last + 1, keep_last)

        status = status_of(start_child(killed_save))
        survivor = newest(folder)  # any warning is an error here: a kill leaves no damage
        assert survivor is not None
        outcomes.append(survivor.step - keep_last)
        assert_whole(survivor, survivor.step)
        assert len([name for name in names(folder) if name.startswith("step-")]) >= keep_last
        prepare(folder)
        save_step(folder, keep_last + 2, keep_last)
        assert_whole(newest(folder), keep_last + 2)
        assert len(names(folder)) == keep_last  # no litter, nothing too many
        if status == 0:
            break
        assert status == -signal.SIGKILL
    # Many kills before the commit, many after it, and one change from the old to the new in between.
    assert outcomes == sorted(outcomes)
    assert outcomes.count(0) > 12
    assert outcomes.count(1) > 7


@pytest.mark.slow
def test_a_failure_at_any_operation_of_a_save_loses_nothing(folder: Path):
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def failing_save(operation: int) -> str:
        at_operation(operation, fail)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                save_step(folder, 3)
            except CheckpointError as error:
                return "refused" if str(folder) in str(error) and error.errno == errno.EIO else "unclear"
        return "warned" if [warning.category for warning in caught] == [CheckpointWarning] else "saved"

    answers, outcomes = ["refused", "unclear", "warned", "saved"], []
    while "saved" not in outcomes:
        shutil.rmtree(folder)
        prepare(folder)
        save_step(folder, 1)
        save_step(folder, 2)
        operation = len(outcomes) + 1
        child = start_child(lambda operation=operation: answers.index(failing_save(operation)))
        outcomes.append(answers[status_of(child)])
        survivor = newest(folder)
        assert survivor is not None
        assert_whole(survivor, survivor.step)
        prepare(folder)
        assert all(name.startswith("step-") for name in names(folder))
    assert outcomes.count("refused") > 12
    assert outcomes.count("warned") > 7  # committed, and an old one could not be verified or removed
    assert "unclear" not in outcomes


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_with_the_same_weights(folder: Path):
    def train(folder: Path) -> None:
        prepare(folder)
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        checkpoint = newest(folder)
        if checkpoint:
            model.load_state_dict(checkpoint.tensors("model"))
            optimizer.load_state_dict(checkpoint.object("optimizer"))
        for step in range(checkpoint.step if checkpoint else 0, 40):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
            tensors, objects = {"model": model.state_dict()}, {"optimizer": optimizer.state_dict()}
            save(folder, step + 1, tensors=tensors, objects=objects, state={}, keep_last=1)
            time.sleep(0.005)  # so that the fastest machine is killed several times

    assert status_of(start_child(lambda: train(folder / "peace"))) == 0
    chance, kills, committed, status = random.Random(0), 0, 0, None
    while status != 0:
        child = start_child(lambda: train(folder / "war"))
        time.sleep(chance.uniform(0, 0.06))
        if kills < 25:
            os.kill(child, signal.SIGKILL)
        status = status_of(child)
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        checkpoint = newest(folder / "war")
        assert checkpoint is not None or not committed
        if checkpoint:
            assert checkpoint.step >= committed
            committed = checkpoint.step
    assert kills >= 5
    peace, war = newest(folder / "peace"), newest(folder / "war")
    assert peace is not None
    assert war is not None
    assert peace.step == war.step == 40
    for name, value in peace.tensors("model").items():
        assert torch.equal(war.tensors("model")[name], value)
    assert names(folder / "war") == ["step-00000040"]


# ---- disks ----


@pytest.mark.parametrize("below", ["", "checkpoints", "deep/checkpoints"])
def test_a_file_where_a_folder_must_be_is_named_once(tmp_path: Path, below: str):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(CheckpointError) as refusal:
        prepare(tmp_path / "run" / below)
    said = f"no checkpoints can be kept in {tmp_path / 'run' / below}: {tmp_path / 'run'} is a file, not a folder"
    assert str(refusal.value) == said


def assert_nothing_lost(folder: Path, refusal: CheckpointError) -> None:
    assert str(folder) in str(refusal)
    assert "bytes" in str(refusal)
    assert names(folder) == ["step-00000001"]
    assert_whole(newest(folder), 1)


def test_a_full_disk_is_an_error_that_names_path_and_bytes(folder: Path):
    with small_disk(folder, size=128 * 1024):
        save_step(folder, 1)
        (folder / "other.bin").write_bytes(bytes(40 * 1024))
        big = {"model": {"weight": torch.zeros(25_000)}}
        with pytest.raises(CheckpointError, match=r"needs 100,\d{3} bytes: .*No space left") as refusal:
            save(folder, 2, tensors=big, objects={}, state={}, keep_last=1)
        assert refusal.value.errno == errno.ENOSPC
        (folder / "other.bin").unlink()
        assert_nothing_lost(folder, refusal.value)
        save_step(folder, 3, keep_last=1)  # there is room again: nothing half written takes it
        assert_whole(newest(folder), 3)


def test_a_file_that_may_not_grow_is_an_error_that_names_path_and_bytes(folder: Path):
    save_step(folder, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"needs 100,\d{3} bytes: .*File too large") as refusal:
            save(folder, 2, tensors={"m": {"w": torch.zeros(25_000)}}, objects={}, state={}, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_nothing_lost(folder, refusal.value)


def test_a_read_only_disk_is_an_error_that_names_path_and_bytes(folder: Path):
    with small_disk(folder, size=128 * 1024):
        save_step(folder, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(CheckpointError, match="Read-only file system") as refusal:
            save_step(folder, 2)
        assert_nothing_lost(folder, refusal.value)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            prepare(folder / "deeper")


def test_a_folder_without_permission_is_an_error_that_names_path_and_bytes(folder: Path):
    save_step(folder, 1)
    folder.parent.chmod(0o755)

    def save_as_somebody_else() -> None:
        os.chdir(folder.parent)  # the way to a temporary folder is barred to others, the folder need not be
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(CheckpointError, match="Permission denied") as refusal:
            save_step(Path(folder.name), 2)
        assert_nothing_lost(Path(folder.name), refusal.value)

    folder.chmod(0o555)
    assert status_of(start_child(save_as_somebody_else)) == 0
    folder.chmod(0o755)


def test_a_vanished_folder_is_an_error_and_not_made_anew(folder: Path):
    save_step(folder, 1)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="No such file") as refusal:
        save_step(folder, 2)
    assert str(folder) in str(refusal.value)
    assert not folder.exists()
