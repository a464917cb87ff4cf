"""train/train.py as it is, but watched: it can stand still before any of its file operations, to be killed there.

    KILL_TRAINING_FOLDER=RUN KILL_TRAINING_REPORT=FILE python tests/watched_training.py --output_dir RUN ...

`kill_training.py` starts it, by a launcher or as a fork of itself. It needs nothing of latentcodec.
"""

import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "train/train.py"
FORK = "fork"  # stands for a launcher
OPERATIONS = {
    "open",
    "fsync",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
}  # audit events, and the flush
# What a training is told in its environment: see `watch`.
FOLDER, REPORT, AIM = "KILL_TRAINING_FOLDER", "KILL_TRAINING_REPORT", "KILL_TRAINING_AIM"


class Start:
    """One start of a training in a session of its own, by a launcher or as a fork of this process."""

    def __init__(self, launcher: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.forked: Any = None
        if launcher == FORK:
            self.forked = multiprocessing.get_context("fork").Process(
                target=self._train, args=(arguments, environment, log)
            )
            self.forked.start()
            self.pid = int(self.forked.pid)
            return
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # this interpreter's torchrun and accelerate
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*shlex.split(launcher), __file__, *arguments],
                cwd=ROOT,
                env=os.environ | environment | {"PATH": path},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.pid = self.process.pid

    @staticmethod
    def _train(arguments: list[str], environment: dict[str, str], log: Path) -> None:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.chdir(ROOT)
        os.environ.update(environment)
        train(arguments)

    def poll(self) -> int | None:
        """Its exit code, minus the signal that killed it; None while it is alive."""
        return self.process.poll() if self.forked is None else self.forked.exitcode


# --- inside the training


def train(arguments: list[str]) -> None:
    """train/train.py as the main program, its file operations watched in the process that writes."""
    if os.environ.get("RANK", "0") == "0":
        watch(Path(os.environ[FOLDER]), Path(os.environ[REPORT]), os.environ.get(AIM))
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


def watch(folder: Path, report: Path, aim: str | None) -> None:
    """Write each file operation in `folder` to `report`, or stand still just before the one that is aimed at.

    `aim` is "3 rename codec": the third of its kind. It says so in `report` and waits to be killed.
    """
    process, seen = os.getpid(), Counter[str]()

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or os.getpid() != process:  # a data worker has its parent's hooks
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        name = operation(event, arguments, folder)
        if name is None:
            return
        seen[name] += 1
        if aim is None:
            with report.open("a") as file:
                file.write(f"{name}\n")
        elif aim == f"{seen[name]} {name}":
            report.touch()
            os.kill(process, signal.SIGSTOP)

    flush = os.fsync
    os.fsync = lambda file: (before("fsync", (file,)), flush(file))[1]
    sys.addaudithook(before)


def operation(event: str, arguments: tuple[Any, ...], folder: Path) -> str | None:
    """Such as "rename checkpoints/step-*"; None outside of the run, and for the line that each step appends."""
    path, *rest = arguments
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    elif event in ("os.remove", "os.rmdir") and rest[0] >= 0:  # by name in an open folder
        path = os.path.join(os.readlink(f"/proc/self/fd/{rest[0]}"), os.fsdecode(path))
    inside = os.path.relpath(os.fsdecode(path), folder)
    if inside.startswith("..") or inside == "metrics.jsonl":
        return None
    return f"{event.removeprefix('os.')} {re.sub('[0-9a-f]{8,}|[0-9]+', '*', inside)}"


if __name__ == "__main__":
    train(sys.argv[1:])
