"""Which of how many processes this one is, as launchers say it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

RANKS = (  # names of the rank and of the number of ranks
    ("RANK", "WORLD_SIZE"),  # torchrun, accelerate
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


def rank_and_world(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process and their number, as torchrun, accelerate or SLURM tell them; (0, 1) where nobody does.

    Tasks of a SLURM array are counted through: with 4 array tasks of 2 processes each there are 8 ranks.
    """
    rank, world = 0, 1
    for rank_name, world_name in RANKS:
        if rank_name in environment and world_name in environment:
            rank, world = int(environment[rank_name]), int(environment[world_name])
            break
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
        task = int(environment["SLURM_ARRAY_TASK_ID"]) - first
        rank, world = task * world + rank, int(environment["SLURM_ARRAY_TASK_COUNT"]) * world
    return rank, world
