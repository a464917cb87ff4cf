"""A training in one folder over all its starts, for `kill_training.py`: its processes, lines and files."""

import atexit
import hashlib
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from watched_training import AIM, FOLDER, REPORT, Start

from latentcodec.training.checkpoint import newest

Line = dict[str, Any]  # of metrics.jsonl


@dataclass
class Run:
    """One training in one folder, over all its starts."""

    launcher: str
    settings: list[str]
    folder: Path
    lines: list[str] = field(default_factory=list)  # metrics.jsonl as it was last read
    written: list[Line] = field(default_factory=list)  # by all starts, also what a later one forgot
    session: int = -1  # of the latest start

    def __post_init__(self) -> None:
        atexit.register(self.clear)

    def clear(self) -> int:
        """Kill what is alive of the run; returns how many processes that were."""
        alive = self.processes()
        for process in alive:
            os.kill(process, signal.SIGKILL)
        return len(alive)

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def report(self) -> Path:
        return self.folder.with_suffix(".operations")

    def start(self, aim: str | None = None) -> Start:
        """Start the training, which stands still where it is told to."""
        self.report.unlink(missing_ok=True)
        environment = {FOLDER: str(self.folder), REPORT: str(self.report)} | ({AIM: aim} if aim else {})
        started = Start(
            self.launcher, [*self.settings, "--output_dir", str(self.folder)], environment, self.log
        )
        self.session = started.pid
        return started

    def processes(self) -> list[int]:
        """The launcher, its workers and their data workers: by their session, or by the folder in their command."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit():
                    continue
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                named = os.fsencode(self.folder) in (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has just ended
            if state not in "ZX" and (
                int(session) == self.session or (named and int(entry.name) != os.getpid())
            ):
                found.append(int(entry.name))
        return found

    def committed_step(self) -> int:
        """Step of the newest checkpoint, 0 without one. A damaged one warns: a kill makes none."""
        checkpoint = newest(self.folder / "checkpoints")
        return checkpoint.step if checkpoint else 0

    def has_stepped(self) -> bool:
        """Whether metrics.jsonl ends with a line that it did not hold when it was last read."""
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        return bool(lines) and lines[-1] not in self.lines

    def new_lines(self) -> list[Line]:
        """What was written to metrics.jsonl since the last call."""
        before, self.lines = self.lines, []
        if self.metrics.exists():
            self.lines = self.metrics.read_text().splitlines(keepends=True)
        same = 0
        while same < min(len(before), len(self.lines)) and before[same] == self.lines[same]:
            same += 1
        new = [json.loads(line) for line in self.lines[same:] if line.endswith("\n")]  # a kill can tear one
        self.written += new
        return new

    def files(self) -> dict[str, str]:
        """SHA-256 of every file left behind, except the checkpoints, by its relative path."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        names = {str(path.relative_to(self.folder)): path for path in paths}
        committed = {name for name in names if name.startswith("checkpoints/step-")}
        return {name: hashlib.sha256(names[name].read_bytes()).hexdigest() for name in {*names} - committed}
