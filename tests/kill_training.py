"""Kill a training again and again; what it ends with must equal a run that was left in peace, bit for bit.

    python tests/kill_training.py --kills 100                       # kill -9, one process
    python tests/kill_training.py --kills 100 --launcher "torchrun --standalone --nproc_per_node 2"
    python tests/kill_training.py --kills 20 --signal TERM --to launcher --launcher "accelerate launch --cpu"
    python tests/kill_training.py --kills 10 -- --config train/configs/NAME.yaml --train.max_steps 100

The kills fall at random into the start, the steps and the saves, a third each. Every start is held against
the checkpoint that it found, every number that any start ever wrote to metrics.jsonl against the run in peace
(as a hexadecimal float), and so are the final codec (as SHA-256) and the list of the files left behind.

Prints a table and ends with one line of JSON; exit code 1 if anything was lost, refused or left behind. Linux
only. pytest does not collect this script.
"""

import argparse
import atexit
import hashlib
import itertools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentcodec.training.checkpoint import newest

ROOT = Path(__file__).parents[1]
SMALL = (
    "--model.block_out_channels [16,16,32] --model.latent_channels 4 --model.norm_num_groups 4 "
    "--data.resolution 32 --data.val_images 2 --data.val_resolution 32 --data.workers 2 "
    "--discriminator.weight 0.1 --discriminator.start_step 10 --discriminator.channels 8 "
    "--train.max_steps 60 --train.batch_size 4 --train.accumulation 2 --train.seed 7 "
    "--train.checkpoint_every 3 --train.validate_every 20 --train.keep_last 1 --train.statistics_images 16"
)
CLOCKS = ("second", "minute")  # keys of metrics.jsonl that contain one of these tell the time
PATIENCE_SECONDS = 300  # for a start to do something, and for an end
ORPHAN_SECONDS = 10  # a process that outlives its launcher by more is an orphan

Line = dict[str, Any]  # of metrics.jsonl


@dataclass
class Tally:
    """What happened in all rounds: first the experiment, then the faults, which must stay 0."""

    kills: int = 0
    kills_inside_a_save: int = 0
    rounds_completed: int = 0
    resumes: int = 0
    numbers_compared: int = 0
    exit_codes: Counter[int] = field(default_factory=Counter)

    refused_resumes: int = 0
    restarts_from_zero: int = 0
    resumes_at_another_step: int = 0
    polite_ends_without_checkpoint: int = 0
    hangs: int = 0
    orphans: int = 0
    numbers_different: int = 0
    lines_missing_or_extra: int = 0
    files_different: int = 0
    litter: int = 0

    def faults(self) -> int:
        """The sum of what must be 0."""
        counts = list(vars(self).items())
        first = list(vars(self)).index("refused_resumes")
        return sum(count for _, count in counts[first:])

    def print(self) -> None:
        """The table."""
        for name, count in vars(self).items():
            shown = dict(sorted(count.items())) if isinstance(count, Counter) else count
            print(f"{name.replace('_', ' '):32}{shown}")


@dataclass
class Run:
    """One training in one folder, over all its starts."""

    command: list[str]
    folder: Path
    lines: list[str] = field(default_factory=list)  # metrics.jsonl as it was last read
    written: list[Line] = field(default_factory=list)  # by all starts, also what a later one forgot

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

    def start(self) -> subprocess.Popen[bytes]:
        """Start the training in a session of its own."""
        command = [*self.command, "--output_dir", str(self.folder)]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # this interpreter's torchrun and accelerate
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PATH": path},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """The launcher, its workers and their data workers: the processes whose command names the folder."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.fsencode(self.folder) in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it has just ended
        return found

    def committed_step(self) -> int:
        """Step of the newest checkpoint, 0 without one. A damaged one warns: a kill makes none."""
        checkpoint = newest(self.folder / "checkpoints")
        return checkpoint.step if checkpoint else 0

    def unfinished(self) -> set[Path]:
        """The checkpoints that are being built or taken down, or were when a kill came."""
        return set((self.folder / "checkpoints").glob(".tmp-*"))

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


def wait_for_a_moment(options: argparse.Namespace, run: Run, launcher: subprocess.Popen[bytes]) -> str:
    """Wait for a random moment of a start: "start", "steps" or "save"; "end" if the training ended before."""
    litter = run.unfinished()
    moment, reached, seconds = options.chance.choice(
        [
            ("start", lambda: True, options.start_seconds),
            ("steps", run.has_stepped, options.steps_seconds),
            ("save", lambda: run.unfinished() - litter, 0.02),
        ]
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        if launcher.poll() is not None:
            return "end"
        if time.monotonic() > deadline:
            return "hang"
        time.sleep(0.001)
    time.sleep(options.chance.uniform(0, seconds))
    return str(moment) if launcher.poll() is None else "end"


def send(options: argparse.Namespace, run: Run, launcher: subprocess.Popen[bytes]) -> None:
    """Send the signal, to the launcher first."""
    number = signal.Signals[f"SIG{options.signal}"]
    others = [process for process in run.processes() if process != launcher.pid]
    launcher.send_signal(number)
    if options.to == "all":
        for process in others:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue  # the launcher was faster


def wait_for_the_end(run: Run, launcher: subprocess.Popen[bytes], tally: Tally) -> int:
    """The launcher's exit code, once nothing of the run is alive any more."""
    patience = time.monotonic() + PATIENCE_SECONDS
    while launcher.poll() is None and time.monotonic() < patience:
        time.sleep(0.01)
    if launcher.poll() is None:
        tally.hangs += 1
        run.clear()
    patience = time.monotonic() + ORPHAN_SECONDS
    while run.processes() and time.monotonic() < patience:
        time.sleep(0.05)
    tally.orphans += run.clear()
    return launcher.wait()


def play(options: argparse.Namespace, run: Run, tally: Tally) -> bool:
    """One round: start and kill the training until it is complete; False if it refuses to go on.

    After the last kill it is left in peace.
    """
    code = None
    while code != 0:
        found = run.committed_step()
        launcher = run.start()
        moment = wait_for_a_moment(options, run, launcher) if tally.kills < options.kills else "peace"
        killed = moment in ("start", "steps", "save")
        if killed:
            send(options, run, launcher)
        tally.kills += killed
        tally.kills_inside_a_save += moment == "save"
        tally.hangs += moment == "hang"
        code = wait_for_the_end(run, launcher, tally)
        steps = [line["step"] for line in run.new_lines() if "psnr" not in line]
        reached = run.committed_step()
        walked = f"{steps[0]} to {steps[-1]}" if steps else "none"
        print(f"found {found}, {moment}, code {code}, steps {walked}, left {reached}", flush=True)
        judge_start(found, steps, tally)
        if killed:
            tally.exit_codes[code] += 1
            polite = options.signal != "KILL"
            tally.polite_ends_without_checkpoint += polite and bool(steps) and reached < steps[-1]
        elif code != 0:
            tally.refused_resumes += 1
            print(f"the training ended by itself:\n{run.log.read_text()[-3000:]}", flush=True)
            return False
    tally.rounds_completed += 1
    return True


def judge_start(found: int, steps: list[int], tally: Tally) -> None:
    """A start must go on behind the checkpoint that it found. It says nothing if it was killed before."""
    if found and steps:
        tally.resumes += steps[0] == found + 1
        tally.restarts_from_zero += steps[0] == 1
        tally.resumes_at_another_step += steps[0] not in (1, found + 1)


def compare(run: Run, peace: Run, tally: Tally) -> None:
    """Hold a completed round against the run in peace."""

    def exact(line: Line) -> dict[str, Any]:
        timeless = {key: value for key, value in line.items() if not any(clock in key for clock in CLOCKS)}
        return {key: value.hex() if isinstance(value, float) else value for key, value in timeless.items()}

    def name(line: Line) -> tuple[Any, ...]:
        return line["step"], "psnr" in line

    expected = {name(line): exact(line) for line in peace.written}
    for line in run.written:
        numbers, truth = exact(line), expected.get(name(line), {})
        tally.numbers_compared += len(numbers)
        tally.numbers_different += sum(numbers.get(key) != truth.get(key) for key in {*numbers, *truth})
    left = Counter(name(json.loads(line)) for line in run.lines)
    wanted = Counter(expected.keys())
    tally.lines_missing_or_extra += ((left - wanted) + (wanted - left)).total()
    files, truth = run.files(), peace.files()
    tally.litter += len(files.keys() - truth.keys())
    tally.litter += sum(1 for _ in (run.folder / "checkpoints").iterdir()) > sum(
        1 for _ in (peace.folder / "checkpoints").iterdir()
    )
    codec = [path for path in truth if path.startswith("codec/") and not path.endswith(".md")]
    tally.files_different += len(truth.keys() - files.keys())
    tally.files_different += sum(path in files and files[path] != truth[path] for path in codec)


def parse() -> argparse.Namespace:
    """The options, with the source of chance among them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT", "USR1"], default="KILL")
    parser.add_argument("--to", choices=["all", "launcher"], default="all", help="which processes get it")
    parser.add_argument("--launcher", default=sys.executable, help="what stands before the script")
    parser.add_argument("--script", default="train/train.py")
    parser.add_argument("--start-seconds", type=float, default=10.0, help="in which the early kills fall")
    parser.add_argument(
        "--steps-seconds", type=float, default=4.0, help="after the first step, for the others"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, help="where the runs are kept; a temporary folder by default")
    parser.add_argument("settings", nargs="*", help="of the training, after --, instead of the small ones")
    options = parser.parse_args()
    options.chance = random.Random(options.seed)
    options.settings = options.settings or shlex.split(SMALL)
    options.out = (options.out or Path(tempfile.mkdtemp(prefix="kill-training-"))).resolve()
    return options


def main() -> int:
    """Run in peace once, then in rounds until all kills are used up."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that `Run.clear` is called
    command = [*shlex.split(options.launcher), options.script, *options.settings]
    tally = Tally()
    peace = Run(command, options.out / "peace")
    code = wait_for_the_end(peace, peace.start(), tally)
    if code != 0:
        sys.exit(f"even the run in peace failed, with code {code}:\n{peace.log.read_text()[-3000:]}")
    peace.new_lines()
    for number in itertools.count(1):
        if tally.kills >= options.kills or tally.refused_resumes == 3:
            break
        run = Run(command, options.out / f"round-{number:03d}")
        if play(options, run, tally):
            compare(run, peace, tally)
    tally.print()
    settings = {
        "launcher": options.launcher,
        "signal": options.signal,
        "to": options.to,
        "seed": options.seed,
    }
    print(json.dumps(settings | vars(tally) | {"faults": tally.faults()}))
    return int(tally.faults() > 0)


if __name__ == "__main__":
    sys.exit(main())
