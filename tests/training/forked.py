"""Children that are forked, not started, so that hundreds of kills take seconds."""

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any


def start_child(work: Callable[[], Any]) -> int:
    """Process id of a forked child that runs `work` and exits with what it returns, 1 if it raises.

    Signals that are ignored here, as after nohup, reach it nevertheless.
    """
    child = os.fork()
    if child == 0:
        try:
            for number in (signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) == signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            os._exit(work() or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def status_of(child: int) -> int:
    """The exit code of a child, or minus the signal that killed it, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
