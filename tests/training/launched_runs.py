"""train/train.py under a launcher: how it is started, waited for, and what it and its processes leave behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "train/train.py"
PATIENCE_SECONDS = 240  # of a test for a process; only a hang takes that long


def wait_until(condition, process=None) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it hangs"
        assert process is None or process.poll() is None, f"it ended with code {process.poll()}"
        time.sleep(0.02)


def lines(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def launch(*command, log: Path, **variables: str) -> subprocess.Popen:
    """A launcher in a session of its own, one thread a process, with these variables in its environment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | variables
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def processes_naming(folder: Path) -> list[int]:
    """The launcher, its processes and their data workers: whose command has the folder in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(folder) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return found


def rejects(output: Path) -> dict[str, str]:
    """rejects.jsonl: reasons by path, each image once."""
    listed = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    reasons = {line["path"]: line["reason"] for line in listed}
    assert len(reasons) == len(listed)
    return reasons
