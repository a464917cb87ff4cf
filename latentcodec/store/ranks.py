"""Which of how many processes this one is, as launchers say it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

RANKS = (  # names of the rank, of the number of ranks, and of the rank among those of a machine
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, accelerate
    # Of srun: in a script that sbatch runs once, NTASKS counts nobody.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def rank_and_world(
    environment: Mapping[str, str] = os.environ,
    rank: int | None = None,
    world: int | None = None,
    arrays: bool = True,
) -> tuple[int, int]:
    """This process and their number, as torchrun, accelerate or SLURM tell them; (0, 1) where nobody does.

    What the caller knows, `rank` or `world`, comes first; with both the environment is not asked.

    Tasks of a SLURM array are counted through: with 4 array tasks of 2 processes each there are 8 ranks. Without
    `arrays` each task is by itself, as trainings are.

    Raises ValueError for an array whose numbers do not follow one another in steps, since its ranks cannot be told,
    naming the variable that holds no number, or whose counterpart is missing, and for a rank that so many processes do
    not have.
    """
    if rank is None or world is None:
        told_rank, told_world = _told(environment, arrays)
        rank, world = told_rank if rank is None else rank, told_world if world is None else world
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}: ranks are 0 to {world - 1}")
    return rank, world


def local_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """This process among those that its launcher has started on this machine; None where no launcher says it.

    Raises ValueError naming the variable that holds no number.
    """
    for names in RANKS:
        if all(name in environment for name in names):
            return _number(environment, names[-1])
    return None


def _told(environment: Mapping[str, str], arrays: bool) -> tuple[int, int]:
    rank, world = 0, 1
    for rank_name, world_name, _ in RANKS:
        if rank_name in environment and world_name in environment:
            rank, world = _number(environment, rank_name), _number(environment, world_name)
            break
        if _number(environment, rank_name) > 0 or _number(environment, world_name) > 1:
            given, missing = (rank_name, world_name) if rank_name in environment else (world_name, rank_name)
            raise ValueError(
                f"{given} is {environment[given]} and {missing} is not set, so the part of this process in the work "
                f"cannot be told: set both, unset {given}, or give --rank and --world"
            )
    if arrays and "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first, step, number, tasks = (
            _number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("MIN", "STEP", "ID", "COUNT")
        )
        task, rest = divmod(number - first, step or 1)
        if rest or task >= tasks:
            raise ValueError(
                f"SLURM array task {environment['SLURM_ARRAY_TASK_ID']} has no place among {tasks} that start at "
                f"{first}: give the array as a range such as --array=0-31, or the command --rank and --world"
            )
        rank, world = task * world + rank, tasks * world
    return rank, world


def _number(environment: Mapping[str, str], name: str) -> int:
    """What a variable says, 0 without it."""
    value = environment.get(name, "0")
    try:
        return int(value)
    except ValueError:
        raise ValueError(
            f"{name} in the environment is {value!r}, not a number: unset it, or set it as a launcher does"
        ) from None
