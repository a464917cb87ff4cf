"""Which of how many processes this one is, as launchers say it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

RANKS = (  # names of the rank and of the number of ranks
    ("RANK", "WORLD_SIZE"),  # torchrun, accelerate
    (
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
    ),  # of srun: in a script that sbatch runs once, NTASKS counts nobody
)


def rank_and_world(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process and their number, as torchrun, accelerate or SLURM tell them; (0, 1) where nobody does.

    Tasks of a SLURM array are counted through: with 4 array tasks of 2 processes each there are 8 ranks. Raises
    ValueError for an array whose numbers do not follow one another in steps, since its ranks cannot be told.
    """
    rank, world = 0, 1
    for rank_name, world_name in RANKS:
        if rank_name in environment and world_name in environment:
            rank, world = int(environment[rank_name]), int(environment[world_name])
            break
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", "0")) for name in ("MIN", "STEP"))
        task, rest = divmod(int(environment["SLURM_ARRAY_TASK_ID"]) - first, step or 1)
        tasks = int(environment["SLURM_ARRAY_TASK_COUNT"])
        if rest or task >= tasks:
            raise ValueError(
                f"SLURM array task {environment['SLURM_ARRAY_TASK_ID']} has no place among {tasks} that start at "
                f"{first}: give the array as a range such as --array=0-31, or the command --rank and --world"
            )
        rank, world = task * world + rank, tasks * world
    return rank, world
