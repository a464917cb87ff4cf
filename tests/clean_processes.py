"""Processes for tests that need several, or one to be killed: forks of a server that has only imported.

They start at once, as forks do, and inherit nothing. A fork of the test's own process would inherit what earlier tests
left there, such as the threads of autograd, without which no backward pass runs in it.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["latentcodec.training.loop", "latentcodec.codec"])


def start_process(log: Path, variables: Mapping[str, str], work: Callable, *arguments) -> BaseProcess:
    """`work` in a process of its own, whose stdout and stderr go into `log`; its result is the exit code."""
    process = CONTEXT.Process(target=_work, args=(log, dict(variables), work, arguments))
    process.start()
    return process


def ranks(count: int) -> list[dict[str, str]]:
    """What the environment tells each of `count` processes of one run on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        for rank in range(count)
    ]


def _work(log: Path, variables: dict[str, str], work: Callable, arguments: tuple) -> None:
    import torch

    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    multiprocessing.set_start_method("fork", force=True)  # as in a program's own process on Linux
    torch.set_num_threads(1)
    sys.exit(work(*arguments))
