"""Every damage of a checkpoint is noticed, and the one before it is used; a run is never silently begun again."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_checkpoints import FILES, assert_whole, names, save_step

from latentcodec.training.checkpoint import CheckpointError, CheckpointWarning, newest


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
