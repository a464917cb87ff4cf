"""What the tests of training share: small images, a folder for checkpoints, train.py as the main program."""

import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
from launched_runs import TRAIN
from small_runs import reset, write_images

from latentcodec.training.checkpoint import prepare
from latentcodec.training.console import end_at_interrupt


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


@pytest.fixture
def run_train(monkeypatch, capfd):
    """train/train.py with some arguments, as the main program of this process: its exit code and its words."""

    def run(*arguments) -> tuple[int, str, str]:
        reset()
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TRAIN), run_name="__main__")
        said = capfd.readouterr()
        return end.value.code, said.out, said.err

    interrupted = signal.getsignal(signal.SIGINT)
    end_at_interrupt()  # as the main program does first, for as long as it lives
    yield run
    signal.signal(signal.SIGINT, interrupted)
