"""What the tests of training share: a folder of small images, and one for checkpoints."""

import os
from pathlib import Path

import pytest
from small_runs import write_images

from latentcodec.training.checkpoint import prepare


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of twelve small pictures that a codec can learn something of."""
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for checkpoints, on a disk that only says that it has written: no kill can tell."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    prepare(tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"
