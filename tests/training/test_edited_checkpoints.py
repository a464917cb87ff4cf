"""Checkpoints that somebody renamed or added to are passed over with the reason; endless nesting is damage."""

import shutil

import pytest
import torch

from latentcodec.training.checkpoint import CheckpointWarning, newest, prepare, save
from latentcodec.training.manifest import CheckpointError
from latentcodec.training.records import record_of


@pytest.fixture
def checkpoints(tmp_path):
    folder = tmp_path / "checkpoints"
    prepare(folder)
    for step in (1, 2):
        save(
            folder, step, tensors={"model": {"w": torch.full((2,), step)}}, objects={}, state={}, keep_last=2
        )
    return folder


def test_a_folder_under_the_name_of_another_step_is_passed_over(checkpoints):
    shutil.copytree(checkpoints / "step-00000001", checkpoints / "step-00000099")
    with pytest.warns(
        CheckpointWarning, match="step-00000099 is damaged: .*saved at step 1; give the folder its name"
    ):
        assert newest(checkpoints).step == 2


def test_a_file_that_no_manifest_lists_is_not_loaded(checkpoints):
    torch.save({}, checkpoints / "step-00000002/discriminator.pt")
    with pytest.warns(CheckpointWarning, match=r"discriminator\.pt: the manifest does not list it"):
        assert newest(checkpoints).step == 1


def test_nesting_without_end_is_damage(checkpoints):
    assert record_of(b"[" * 100_000) is None
    for step in ("1", "2"):
        (checkpoints / f"step-0000000{step}/manifest.json").write_text("[" * 100_000)
    with pytest.warns(CheckpointWarning, match="not JSON"), pytest.raises(CheckpointError):
        newest(checkpoints)
