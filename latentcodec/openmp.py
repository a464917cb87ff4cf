"""How long the threads of OpenMP wait awake for one another; imports no PyTorch, since it must come before it."""

import os

SPINS = 2000
"""How often a waiting thread looks again before it sleeps.

Measured on two cores of Zen 3 (AVX2): seconds of a training step of the demo, alone, and beside a process that never
rests. 0: 0.76 to 1.1, 0.9. 2,000: 0.61, 1.1. 20,000: 0.53 to 0.65, 1.8. OpenMP's default: 0.55 to 0.64, 1.8.
"""


def wait_briefly() -> None:
    """Let waiting threads sleep soon, since spinning ones hold up what runs beside them, such as data workers.

    OpenMP reads these variables when PyTorch is loaded, so call this first. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
