"""Kill a training again and again; what it ends with must equal a run that was left in peace, bit for bit.

    python tests/kill_training.py --kills 100                       # kill -9, one process
    python tests/kill_training.py --kills 100 --launcher "torchrun --standalone --nproc_per_node 2"
    python tests/kill_training.py --kills 20 --signal TERM --to launcher --launcher "accelerate launch --cpu"
    python tests/kill_training.py --kills 10 -- --config train/configs/NAME.yaml --train.max_steps 100

Of ten kills two fall anywhere into the start and two anywhere into the steps. The other six are aimed: the training
stands still just before a file operation (a file that is made, a flush to the disk, a rename, a removal), and is killed
there; each kind of operation that the run in peace did takes its turn, so that every phase of a save, and of the
finish, is met. Every start is held against the checkpoint that it found, every number that any start ever wrote to
metrics.jsonl against the run in peace (as a hexadecimal float), and so are the final codec (as SHA-256) and the list
of the files left behind.

Without --launcher the trainings are forked from this process, which has imported all they need: 100 kills then take
minutes. Prints a table and ends with one line of JSON; exit code 1 if anything was lost, refused or left behind.
Linux only. pytest does not collect this script.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from kill_tally import Tally, compare, judge_start
from killed_run import Run
from watched_training import FORK, Start

import latentcodec.training.loop  # noqa: F401 - whatever is forked has it then

SMALL = (
    "--model.block_out_channels [8,8,16] --model.latent_channels 4 --model.norm_num_groups 2 --model.init default "
    "--data.resolution 32 --data.val_images 2 --data.val_resolution 32 --data.workers 2 "
    "--discriminator.weight 0.1 --discriminator.start_step 10 --discriminator.channels 8 "
    "--train.max_steps 30 --train.batch_size 2 --train.accumulation 2 --train.seed 7 "
    "--train.checkpoint_every 3 --train.validate_every 10 --train.keep_last 1 --train.statistics_images 8 "
    "--finish.certificate_images 1"
)
PATIENCE_SECONDS = 300  # for a start to do something, and for an end
ORPHAN_SECONDS = 10  # a process that outlives its launcher by more is an orphan


@dataclass
class Killer:
    """When the next kill comes, and how."""

    options: argparse.Namespace
    start_seconds: float  # of the run in peace, until its first step
    steps_seconds: float  # and from then until two saves later
    operations: Counter[str]  # of the run in peace
    chance: random.Random
    aims: list[str] = field(default_factory=list)  # kinds of operations whose turn is still to come
    met: set[str] = field(default_factory=set)

    def next_moment(self) -> tuple[str, str | None]:
        """A moment, and for an operation the aim."""
        moment = self.chance.choices(["start", "steps", "operation"], [2, 2, 6])[0]
        if moment != "operation":
            return moment, None
        if not self.aims:
            self.aims = sorted(self.operations)
            self.chance.shuffle(self.aims)
        name = self.aims.pop()
        return moment, f"{self.chance.randint(1, min(2, self.operations[name]))} {name}"

    def wait(self, moment: str, run: Run, started: Start) -> str:
        """Wait for that moment of a start; returns it, or "end" if the training ended before, or "hang"."""
        reached = {"start": lambda: True, "steps": run.has_stepped, "operation": run.report.exists}[moment]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            if started.poll() is not None:
                return "end"
            if time.monotonic() > deadline:
                return "hang"
            time.sleep(0.002)
        if moment != "operation":
            time.sleep(
                self.chance.uniform(0, self.start_seconds if moment == "start" else self.steps_seconds)
            )
        return moment if started.poll() is None else "end"

    def kill(self, run: Run, started: Start) -> None:
        """Send the signal, to the launcher first, and wake what stands still."""
        number = signal.Signals[f"SIG{self.options.signal}"]
        others = [process for process in run.processes() if process != started.pid]
        for process in [started.pid, *(others if self.options.to == "all" else [])]:
            with contextlib.suppress(ProcessLookupError):  # the launcher was faster
                os.kill(process, number)
        for process in run.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def wait_for_the_end(run: Run, started: Start, tally: Tally) -> int:
    """The launcher's exit code, once nothing of the run is alive any more."""
    patience = time.monotonic() + PATIENCE_SECONDS
    while started.poll() is None and time.monotonic() < patience:
        time.sleep(0.01)
    if started.poll() is None:
        tally.hangs += 1
        run.clear()
    patience = time.monotonic() + ORPHAN_SECONDS
    while run.processes() and time.monotonic() < patience:
        time.sleep(0.05)
    tally.orphans += run.clear()
    while (code := started.poll()) is None:
        time.sleep(0.01)
    return code


def play(killer: Killer, run: Run, tally: Tally) -> bool:
    """One round: start and kill the training until it is complete; False if it refuses to go on.

    After the last kill it is left in peace.
    """
    code = None
    while code != 0:
        found = run.committed_step()
        moment, aim = killer.next_moment() if tally.kills < killer.options.kills else ("peace", None)
        started = run.start(aim)
        if moment != "peace":
            moment = killer.wait(moment, run, started)
        killed = moment in ("start", "steps", "operation")
        if killed:
            killer.kill(run, started)
            count_kill(moment, aim, found, killer, tally)
        elif aim is not None:
            killer.aims.insert(0, aim.partition(" ")[2])  # not done in this start: it has its turn later
        tally.hangs += moment == "hang"
        code = wait_for_the_end(run, started, tally)
        steps = [line["step"] for line in run.new_lines() if "psnr" not in line]
        reached = run.committed_step()
        walked = f"{steps[0]} to {steps[-1]}" if steps else "none"
        where = f"before {aim}" if moment == "operation" else moment
        print(
            f"{tally.kills}: found {found}, {where}, code {code}, steps {walked}, left {reached}", flush=True
        )
        judge_start(found, steps, tally)
        tally.checkpoints_lost += reached < found
        if killed:
            tally.exit_codes[code] += 1
            polite = killer.options.signal != "KILL"
            tally.polite_ends_without_checkpoint += polite and bool(steps) and reached < steps[-1]
        elif code != 0:
            tally.refused_resumes += 1
            print(f"the training ended by itself:\n{run.log.read_text()[-3000:]}", flush=True)
            return False
    tally.rounds_completed += 1
    return True


def count_kill(moment: str, aim: str | None, found: int, killer: Killer, tally: Tally) -> None:
    """Count a kill, and the kinds of operations that have been met."""
    tally.kills += 1
    tally.kills_in_the_start += moment == "start"
    tally.kills_in_the_steps += moment == "steps"
    tally.kills_with_a_checkpoint_of_a_step += found > 0
    if moment == "operation" and aim is not None:
        tally.kills_at_an_operation += 1
        killer.met.add(aim.partition(" ")[2])
        tally.kinds_killed_at = len(killer.met)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT", "USR1"], default="KILL")
    parser.add_argument("--to", choices=["all", "launcher"], default="all", help="which processes get it")
    parser.add_argument("--launcher", default=FORK, help="the command before the script; default: no command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, help="where the runs are kept; a temporary folder by default")
    parser.add_argument("settings", nargs="*", help="of the training, after --, instead of the small ones")
    options = parser.parse_args()
    options.settings = options.settings or shlex.split(SMALL)
    options.out = (options.out or Path(tempfile.mkdtemp(prefix="kill-training-"))).resolve()
    return options


def in_peace(options: argparse.Namespace, tally: Tally) -> tuple[Run, Killer]:
    """A run that nobody kills, and the killer who has watched it."""
    run = Run(options.launcher, options.settings, options.out / "peace")
    began = time.monotonic()
    started = run.start()
    while not run.has_stepped() and started.poll() is None:
        time.sleep(0.01)
    first_step = time.monotonic()
    code = wait_for_the_end(run, started, tally)
    if code != 0:
        sys.exit(f"even the run in peace failed, with code {code}:\n{run.log.read_text()[-3000:]}")
    run.new_lines()
    operations = Counter(run.report.read_text().splitlines())
    saves = max(
        1, sum(count for name, count in operations.items() if re.match(r"rename checkpoints/.tmp", name))
    )
    steps_seconds = 2 * (time.monotonic() - first_step) / saves
    tally.kinds_of_operations = len(operations)
    print(
        f"in peace: {first_step - began:.1f} s to the first step, {saves} saves, {steps_seconds / 2:.2f} s each"
    )
    return run, Killer(options, first_step - began, steps_seconds, operations, random.Random(options.seed))


def main() -> int:
    """Run in peace once, then in rounds until all kills are used up."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that `Run.clear` is called
    tally = Tally()
    peace, killer = in_peace(options, tally)
    for number in itertools.count(1):
        if tally.kills >= options.kills or tally.refused_resumes == 3:
            break
        run = Run(options.launcher, options.settings, options.out / f"round-{number:03d}")
        if play(killer, run, tally):
            compare(run, peace, tally)
    tally.print()
    never = sorted(killer.operations.keys() - killer.met)
    print(f"never killed before: {', '.join(never) or 'none'}")
    settings = {name: getattr(options, name) for name in ("launcher", "signal", "to", "seed")}
    print(json.dumps(settings | vars(tally) | {"faults": tally.faults()}))
    return int(tally.faults() > 0)


if __name__ == "__main__":
    sys.exit(main())
