"""What `kill_training.py` counts: kills, and the faults found where a run is held against the one left in peace."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from killed_run import Line, Run

CLOCKS = ("second", "minute")  # keys of metrics.jsonl that contain one of these tell the time


@dataclass
class Tally:
    """What happened in all rounds: first the experiment, then the faults, which must stay 0."""

    kills: int = 0
    kills_in_the_start: int = 0
    kills_in_the_steps: int = 0
    kills_at_an_operation: int = 0
    kinds_of_operations: int = 0
    kinds_killed_at: int = 0
    kills_with_a_checkpoint_of_a_step: int = 0
    rounds_completed: int = 0
    resumes: int = 0
    numbers_compared: int = 0
    exit_codes: Counter[int] = field(default_factory=Counter)

    refused_resumes: int = 0
    restarts_from_zero: int = 0
    resumes_at_another_step: int = 0
    checkpoints_lost: int = 0
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
            print(f"{name.replace('_', ' '):36}{shown}")


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
