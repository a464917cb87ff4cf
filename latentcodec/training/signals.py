"""How a training run is asked to stop, and how it then ends.

SIGTERM, SIGINT, SIGUSR1 (SLURM's usual warning before preemption) and SIGHUP, and the end of the launcher, only
are noted as a request; the loop reads it once a step, saves a checkpoint and ends with exit code 128 + signal:

    SIGTERM 143 | SIGINT (Ctrl-C) 130 | SIGUSR1 138 | SIGHUP (the terminal is gone) 129 | the launcher died 143

A second Ctrl-C, later than a second after the first, ends the process at once; so does SIGKILL, and so does any of
the three before the first step, when there is nothing to save. What was committed is never lost.

What launchers do with a signal that is sent to them alone, and the code that they end with themselves (torch 2.15,
accelerate 1.15, all tried):

                                      SIGTERM         SIGINT          SIGUSR1
    torchrun                          passed on, 1    passed on, 1    dies of it
    torchrun --signals-to-handle ...  passed on, 1    passed on, 1    passed on, 1    (SIGTERM,SIGINT,SIGUSR1)
    accelerate launch, one process    dies of it      dies of it      dies of it

`torchrun` kills what has not ended after 30 s (`--shutdown-timeout`). `accelerate launch` with several processes is
torchrun inside, and takes the option from the environment: `PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1`.

Where a launcher dies, the run notices at its next step that its parent process is gone, saves and ends. So every
signal to every launcher ends in a checkpoint, and only the launcher's own exit code varies.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

# SIGHUP: the terminal or the connection is gone. Windows knows the first two only.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)
GRACE_SECONDS = 30  # what torchrun and SLURM leave between SIGTERM and SIGKILL
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE")  # set by torchrun, accelerate launch


class StopRequest:
    """Notes, while it is entered, that this process was asked to stop.

    Processes receive a signal at different steps: reduce `received` by its maximum over all of them before
    acting on it. Only the main thread can enter. `parent`: the process whose end counts as SIGTERM; by default the
    launcher, where there is one.
    """

    def __init__(self, parent: int | None = None) -> None:
        self._launcher = _launcher() if parent is None else parent
        self._received = 0
        self._received_at = 0.0

    def __enter__(self) -> Self:
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as after nohup
        self._previous = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def received(self) -> int:
        """The number of the first signal received, SIGTERM if the launcher has died, else 0."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        return self._received or (signal.SIGTERM if orphaned else 0)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self._received:
            self._received, self._received_at = number, time.monotonic()
        # Not within the second: one Ctrl-C can arrive twice, by way of the launcher and from the terminal.
        elif number == signal.SIGINT and time.monotonic() > self._received_at + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def exit_code(received: int) -> int:
    """The exit code of a run that was stopped by a signal, as a shell would report its death."""
    return 128 + received


def shield_data_worker(worker_id: int) -> None:
    """Let a data worker survive signals to the whole process group: a DataLoader's `worker_init_fn`.

    torchrun, SLURM and a terminal signal the workers along with the run, which needs them for the batches up
    to its checkpoint and stops them itself. SIGTERM still ends a worker that hangs, after GRACE_SECONDS.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def held() -> Iterator[None]:
    """Delay signals, in processes that are started meanwhile too: one would end a data worker before it is shielded."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which sends no signals to groups
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _launcher() -> int | None:
    """The process id of the launcher above this process: None without one, 0 if it has died already.

    Without a launcher no parent is watched: `nohup python train.py &` is meant to go on after its shell.
    """
    if not any(name in os.environ for name in LAUNCHER_VARIABLES):
        return None
    init = Path("/proc/1/cmdline")
    # A process whose parent has died gets process 1 as its parent. In a container that may be the launcher itself,
    # which is a Python program.
    if os.getppid() == 1 and not (init.exists() and b"python" in init.read_bytes()):
        return 0
    return os.getppid()
