"""How long the threads of OpenMP wait awake for one another. This file imports nothing, so that it comes before PyTorch."""

import os

SPINS = 2000
"""Rounds that a waiting thread looks again before it sleeps. Measured on two cores without AVX-512, seconds of a training
step (alone, and beside a process that never rests): 0 rounds 0.76 to 1.1 and 0.89, 2,000 rounds 0.61 and 1.1, 20,000
rounds 0.53 to 0.65 and 1.8, OpenMP's own setting 0.55 to 0.64 and 1.8."""


def wait_briefly() -> None:
    """Let waiting threads sleep soon, since spinning ones hold up what runs beside them, such as data workers.

    OpenMP reads these variables when PyTorch is loaded, so call this first. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
