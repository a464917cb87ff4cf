"""The commit protocol of checkpoints and the polite end of a run, against real kills, failures and damage.

Children are forked, not started, so that hundreds of kills take seconds.
"""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from latentcodec.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWarning,
    newest,
    prepare,
    read,
    save,
)
from latentcodec.training.data.stream import Batches
from latentcodec.training.signals import SIGNALS, StopRequest, exit_code, shield_data_worker

FILES = ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "manifest.json"]


# --- What is saved ---


def weights(step: int) -> dict[str, Tensor]:
    """The weights that a run has at this step."""
    value = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(step))
    return {
        "conv.weight": value.contiguous(memory_format=torch.channels_last),
        "conv.bias": value[:, 0, 0, 0],
    }


def save_step(folder: Path, step: int, keep_last: int = 2) -> Path:
    ema = {name: value / 2 for name, value in weights(step).items()}
    moments = {"state": {0: {"step": torch.tensor(step), "exp_avg": weights(step)["conv.weight"]}}}
    return save(
        folder,
        step,
        tensors={"model": weights(step), "ema": ema},
        objects={"optimizer": moments},
        state={"images_seen": 16 * step, "model": {"channels": (4, 8)}},
        keep_last=keep_last,
    )


def assert_whole(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    for name, value in weights(step).items():
        assert torch.equal(checkpoint.tensors("model")[name], value)
        assert torch.equal(checkpoint.tensors("ema")[name], value / 2)
    moments = checkpoint.object("optimizer")["state"][0]
    assert torch.equal(moments["exp_avg"], weights(step)["conv.weight"])
    assert checkpoint.state == {"images_seen": 16 * step, "model": {"channels": [4, 8]}, "step": step}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for checkpoints, on a disk that only says that it has written: no kill can tell."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    prepare(tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"


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


# --- Damage ---


def mutations(data: bytes) -> Iterator[bytes]:
    """The file truncated, extended, zeroed and with single bits flipped: about fifty versions of it."""
    size = len(data)
    yield from (data[:length] for length in (0, 1, size // 3, size // 2, size - 1))
    yield data + b"\0"
    zeroed = [bytes(size), bytes(size // 2) + data[size // 2 :], data[: size // 2] + bytes(size - size // 2)]
    yield from (version for version in zeroed if version != data)
    for bit in range(3, 8 * size, max(1, 8 * size // 40)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_noticed_and_the_checkpoint_before_is_used(folder: Path, name: str):
    save_step(folder, 1)
    file = save_step(folder, 2) / name
    whole = file.read_bytes()
    count = 0
    for count, damaged in enumerate(mutations(whole), 1):  # noqa: B007
        file.write_bytes(damaged)
        with pytest.warns(CheckpointWarning) as caught:
            checkpoint = newest(folder)
        assert checkpoint is not None
        assert checkpoint.step == 1
        [message] = [str(warning.message) for warning in caught]
        assert str(file.parent) in message
        assert name in message or name == "manifest.json"  # its own damage may speak of another file
    assert count >= 45
    file.unlink()
    with pytest.warns(CheckpointWarning, match=rf"{name}: No such file"):
        assert_whole(newest(folder), 1)
    file.write_bytes(whole)
    assert_whole(newest(folder), 2)


@pytest.mark.parametrize("text", ["{}", "[]", "null"])
def test_a_manifest_that_promises_nothing_is_damaged(folder: Path, text: str):
    save_step(folder, 1)
    (save_step(folder, 2) / "manifest.json").write_text(text)
    with pytest.warns(CheckpointWarning, match=r"step-00000002 is damaged: manifest\.json"):
        assert_whole(newest(folder), 1)


@pytest.mark.parametrize("kind", ["a name", "a link", "a FIFO"])
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_manifest_or_a_file_that_leads_to_a_device_is_damage(folder: Path, name: str, kind: str):
    """/dev/zero has no end, and a FIFO keeps its reader waiting."""
    save_step(folder, 1)
    damaged = save_step(folder, 2)
    if kind == "a name":
        manifest = json.loads((damaged / "manifest.json").read_text())
        (damaged / "manifest.json").write_text(json.dumps(manifest | {"/dev/zero": manifest["state.json"]}))
        words = "it names '/dev/zero'"
    else:
        (damaged / name).unlink()
        (damaged / name).symlink_to("/dev/zero") if kind == "a link" else os.mkfifo(damaged / name)
        words = f"{name}: a {'device' if kind == 'a link' else 'FIFO'}, not a file"
    with pytest.warns(CheckpointWarning, match=f"step-00000002 is damaged: .*{words}"):
        assert_whole(newest(folder), 1)


def test_every_byte_of_the_manifest_counts(folder: Path):
    save_step(folder, 1)
    file = save_step(folder, 2) / "manifest.json"
    whole = file.read_bytes()
    for position, byte in enumerate(whole):
        file.write_bytes(whole[:position] + bytes([byte ^ 1 << position % 8]) + whole[position + 1 :])
        with pytest.warns(CheckpointWarning):
            checkpoint = newest(folder)
        assert checkpoint is not None
        assert checkpoint.step == 1


def test_a_run_is_never_silently_begun_again(folder: Path):
    for path in [save_step(folder, step) for step in (1, 2)]:
        (path / "ema.safetensors").write_bytes(b"")
    with (
        pytest.warns(CheckpointWarning, match=r"ema\.safetensors"),
        pytest.raises(CheckpointError, match=r"step-00000002, step-00000001\. Bring one") as refusal,
    ):
        newest(folder)
    assert str(folder) in str(refusal.value)


def test_a_damaged_checkpoint_does_not_count_as_kept(folder: Path):
    save_step(folder, 1)
    (save_step(folder, 2) / "state.json").write_bytes(b"")
    with pytest.warns(CheckpointWarning, match=r"step-00000002 is damaged: state\.json"):
        save_step(folder, 3, keep_last=2)
    assert names(folder) == ["step-00000001", "step-00000003"]


def test_a_newer_checkpoint_that_could_not_be_used_stays_until_its_step_comes_again(folder: Path):
    (save_step(folder, 3) / "state.json").write_bytes(b"")
    save_step(folder, 2, keep_last=1)
    assert names(folder) == ["step-00000002", "step-00000003"]
    save_step(folder, 4, keep_last=1)
    assert names(folder) == ["step-00000004"]


def test_a_step_whose_checkpoint_was_damaged_is_saved_beside_it(folder: Path):
    save_step(folder, 1)
    (save_step(folder, 2) / "state.json").write_bytes(b"")
    assert save_step(folder, 2, keep_last=1).name == "step-00000002.1"
    assert_whole(newest(folder), 2)
    assert names(folder) == ["step-00000002.1"]


# --- Kills and failures inside a save ---


def start_child(work: Callable[[], Any]) -> int:
    """Process id of a forked child that runs `work` and exits with what it returns, 1 if it raises."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work() or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def status_of(child: int) -> int:
    """The exit code of a child, or minus the signal that killed it, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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


# --- Disks ---


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes in the folder `place`; skips the test where none can be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


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


def test_prepare_removes_what_killed_runs_left_and_nothing_else(folder: Path):
    save_step(folder, 1)
    shutil.copytree(folder / "step-00000001", folder / ".tmp-step-00000002-4711")
    (folder / "notes.txt").write_text("mine")
    prepare(folder)
    assert names(folder) == ["notes.txt", "step-00000001"]
    assert_whole(newest(folder), 1)


# --- Signals ---


def loop(ready: Path, save_seconds: float = 0.0) -> int:
    """A training loop: steps until it is asked to stop, saves, leaves. Its file tells how far it got."""
    deadline = time.monotonic() + 20
    with StopRequest() as stop:
        ready.write_text("stepping")
        while not stop.received:
            assert time.monotonic() < deadline, "nobody asked for a stop"
            time.sleep(0.005)
        ready.write_text("saving")
        time.sleep(save_seconds)
        ready.write_text("saved")
        return exit_code(stop.received)


def wait_for(file: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while not (file.exists() and file.read_text() == text):
        assert time.monotonic() < deadline, f"{file} never said {text!r}"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138), ("SIGHUP", 129)]
)
def test_a_signal_lets_the_run_save_and_leave_with_its_code(tmp_path: Path, number: str, code: int):
    said = tmp_path / "said"
    child = start_child(lambda: loop(said))
    wait_for(said, "stepping")
    os.kill(child, signal.Signals[number])
    assert status_of(child) == code
    assert said.read_text() == "saved"


def test_a_second_interrupt_ends_the_process_at_once_but_not_the_echo_of_the_first(tmp_path: Path):
    said = tmp_path / "said"
    child = start_child(lambda: loop(said, save_seconds=60))
    wait_for(said, "stepping")
    os.kill(child, signal.SIGINT)
    wait_for(said, "saving")
    os.kill(child, signal.SIGINT)  # a terminal's, after the launcher's
    time.sleep(1.1)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGINT)
    assert status_of(child) == -signal.SIGINT  # a shell says 130
    assert said.read_text() == "saving"


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE"])
def test_a_run_whose_launcher_dies_saves_and_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
):
    monkeypatch.setenv(variable, "1")
    said = tmp_path / "said"
    launcher = start_child(lambda: status_of(start_child(lambda: loop(said))))
    wait_for(said, "stepping")
    os.kill(launcher, signal.SIGKILL)
    assert status_of(launcher) == -signal.SIGKILL
    wait_for(said, "saved")


def test_a_launcher_that_died_before_the_run_began_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert StopRequest().received == 0
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"/sbin/init\0")
    assert StopRequest().received == signal.SIGTERM
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"/usr/bin/python\0/usr/bin/torchrun\0train.py\0")
    assert StopRequest().received == 0  # a container's first process may be the launcher


def test_a_run_without_a_launcher_outlives_its_shell(tmp_path: Path):
    said = tmp_path / "said"

    def shell() -> int:
        (tmp_path / "pid").write_text(str(start_child(lambda: loop(said))))
        wait_for(said, "stepping")
        return 0

    assert status_of(start_child(shell)) == 0
    time.sleep(0.1)
    assert said.read_text() == "stepping"
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    wait_for(said, "saved")


def test_a_signal_that_is_ignored_stays_ignored_as_after_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_data_workers_outlive_a_signal_to_the_whole_process_group(tmp_path: Path, number: str):
    said = tmp_path / "said"
    if signal.getsignal(signal.Signals[number]) == signal.SIG_IGN:
        pytest.skip(f"{number} is ignored here, as after nohup")

    def train() -> int:
        os.setpgid(0, 0)
        with StopRequest() as stop:
            loader = DataLoader(range(10**6), num_workers=2, worker_init_fn=shield_data_worker)
            for count, _ in enumerate(loader):
                if count == 10:
                    said.write_text("stepping")
                if stop.received and not count_at_stop:
                    count_at_stop.append(count)
                if count_at_stop and count == count_at_stop[0] + 20:  # more batches than were prefetched
                    said.write_text("saved")
                    return exit_code(stop.received)
        return 1

    count_at_stop: list[int] = []
    child = start_child(train)
    wait_for(said, "stepping")
    os.killpg(child, signal.Signals[number])
    assert status_of(child) == exit_code(signal.Signals[number])
    assert said.read_text() == "saved"


def test_a_signal_that_comes_before_a_data_worker_is_shielded_does_not_end_it():
    def late(worker: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        shield_data_worker(worker)

    batches = [{"position": position} for position in range(4)]
    loader = DataLoader(batches, num_workers=1, worker_init_fn=late, batch_size=None)
    assert [batch["position"] for batch in Batches(loader)] == [0, 1, 2, 3]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
