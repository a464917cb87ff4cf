"""A run that has come to a standstill ends with a sentence that says what it was waiting for."""

import itertools
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest
from clean_processes import ranks, start_process
from small_runs import small, write_config, write_images

from latentcodec.sources.encoded import EncodedSource
from latentcodec.training import watchdog
from latentcodec.training.loop import main
from latentcodec.training.watchdog import OTHERS, READING, doing, running_time, watching

PATIENCE_SECONDS = 120  # of a test
MINUTES = 0.002  # 0.12 seconds


@contextmanager
def watched(monkeypatch, tick: float = 0.01):
    """A watch with very little patience: the codes that it ends with."""
    monkeypatch.setattr(watchdog, "TICK_SECONDS", tick)
    codes = []
    with watching(MINUTES, codes.append):
        yield codes


def soon(condition) -> bool:
    """Whether a condition comes true within two seconds."""
    return any(condition() or time.sleep(0.01) for _ in range(200))


def test_a_standstill_ends_the_process_and_says_what_it_was_at(monkeypatch, capsys):
    with watched(monkeypatch) as codes:
        doing(READING)
        assert soon(lambda: codes)
    assert codes == [1]
    said = capsys.readouterr().err
    assert said.startswith(
        "error: nothing has happened for 0.002 minutes (train.patience_minutes) while reading images."
    )
    assert "data.path" in said
    assert said.count("\n") == 1


def test_signs_of_life_keep_a_run_alive(monkeypatch):
    with watched(monkeypatch) as codes:
        for _ in range(30):
            doing(READING)
            time.sleep(0.02)
        assert codes == []


def test_a_download_takes_as_long_as_it_takes(monkeypatch):
    with watched(monkeypatch) as codes:
        doing("loading", timed=False)
        time.sleep(0.5)
        assert codes == []
        doing(READING)
        assert soon(lambda: codes)


def test_a_process_that_waits_for_others_leaves_them_time_to_say_what_is_wrong(monkeypatch):
    monkeypatch.setattr(watchdog, "FOR_OTHERS", 1e9)
    with watched(monkeypatch) as codes:
        doing(OTHERS)
        time.sleep(0.5)
        assert codes == []


def test_the_time_in_which_the_process_was_stopped_does_not_count(monkeypatch):
    """As after SIGSTOP, or a night's sleep of the machine: the clock has gone on by an hour between two looks at it."""
    hours = itertools.count(step=3600.0)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(hours))
    doing(READING)
    monkeypatch.setattr(watchdog, "TICK_SECONDS", 0.01)
    codes, over = [], threading.Event()
    thread = threading.Thread(
        target=watchdog._watch, args=(0.01, over, codes.append)
    )  # 0.6 s are 30 looks of 0.02 s
    thread.start()
    time.sleep(0.1)
    over.set()
    thread.join()
    assert codes == []


def test_the_clock_of_training_stands_still_while_the_process_is_stopped(monkeypatch):
    clock = itertools.count(step=0.0)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock))
    with watched(monkeypatch):
        begin = running_time()
        clock = itertools.count(5, 0)  # a step that is slow, and no stop
        assert running_time() - begin == 5
        assert soon(lambda: watchdog._now.looks._last[0] == 5)
        clock = itertools.count(3605, 0)
        assert running_time() - begin == 5  # whether the watch has noticed, or not yet
        assert soon(lambda: watchdog._now.looks._last[0] == 3605)
        clock = itertools.count(3606, 0)
        assert running_time() - begin == 6
    assert running_time() == 3606


def test_nothing_is_watched_after_the_run(monkeypatch):
    with watched(monkeypatch) as codes:
        doing(READING)
    time.sleep(0.5)
    assert codes == []


# ---- real processes ----


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "set")


def train_until_a_read_hangs(now, watches, arguments):
    """The command, in which every read of an image hangs once the file `now` is there, in the last process of a run.

    Its patience begins to run then, if it `watches`: until then the machine may be as slow as it is.
    """

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return time.monotonic() if watches and now.exists() else 0.0

    read = EncodedSource.read

    def hanging_read(source, index):
        if now.exists() and int(os.environ.get("RANK", 0)) + 1 == int(os.environ.get("WORLD_SIZE", 1)):
            time.sleep(10_000)
        return read(source, index)

    watchdog.time, EncodedSource.read = Clock, hanging_read
    return main(arguments)


@pytest.fixture
def begin(tmp_path, images):
    """What starts a run, all of whose processes are gone after the test."""
    started = []
    yield lambda *told, **how: begun(started, tmp_path, images, *told, **how)
    for process in started:
        process.kill()
        process.join()


def begun(started, tmp_path, images, *told, workers=1, watching=(0,)):
    """The processes of an endless run, two steps after its start, and their logs.

    `told`: the environment of each. Those that are `watching` have six seconds of patience.
    """
    config = small(tmp_path / "run", images, workers=workers, max_steps=100_000, validate_every=0)
    config = replace(config, train=replace(config.train, patience_minutes=0.1, checkpoint_every=10_000))
    file = write_config(config, tmp_path / "run.yaml")
    logs = [tmp_path / f"{number}.log" for number in range(len(told))]
    for rank, (log, variables) in enumerate(zip(logs, told, strict=True)):
        arguments = (tmp_path / "now", rank in watching, ["--config", str(file)])
        started.append(start_process(log, variables, train_until_a_read_hangs, *arguments))
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert time.monotonic() < deadline, logs[0].read_text()
        assert all(process.is_alive() for process in started), logs[0].read_text()
        time.sleep(0.05)
    return started, logs


def worker_of(process):
    """The only data worker of a process."""
    children = psutil.Process(process.pid).children()
    (worker,) = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    return worker


@pytest.mark.slow
def test_a_data_worker_that_hangs_is_named_and_ended(tmp_path, begin):
    (process,), (log,) = begin({})
    worker = worker_of(process)
    (tmp_path / "now").touch()
    process.join(PATIENCE_SECONDS)
    said = log.read_text()
    assert process.exitcode == 1, said
    assert f"while {READING}." in said
    assert f"The data workers: {worker.pid} (" in said
    gone, _ = psutil.wait_procs(
        [worker], timeout=10
    )  # it is killed when the process ends, and may take a moment
    assert gone or worker.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_data_worker_that_the_system_has_ended_is_said_in_one_line(tmp_path, begin):
    (process,), (log,) = begin({})
    worker_of(process).kill()
    process.join(PATIENCE_SECONDS)
    said = log.read_text()
    assert process.exitcode == 1, said
    assert "error: a data worker was ended from outside" in said
    assert "Traceback" not in said, said


@pytest.mark.slow
def test_a_process_of_the_run_that_hangs_is_noticed_by_the_others(tmp_path, begin):
    processes, logs = begin(*ranks(2), workers=0)
    (tmp_path / "now").touch()
    processes[0].join(PATIENCE_SECONDS)
    said = logs[0].read_text()
    assert processes[0].exitcode == 1, said
    assert "error: process 0 of 2: nothing has happened for 0.1 minutes (train.patience_minutes)" in said
    assert f"{OTHERS}. Was one of them stopped" in said


@pytest.mark.slow
def test_a_process_of_the_run_that_has_died_is_said_in_one_line(tmp_path, begin):
    processes, logs = begin(*ranks(2), workers=0)
    processes[1].kill()
    processes[0].join(PATIENCE_SECONDS)
    said = logs[0].read_text()
    assert processes[0].exitcode == 1, said
    assert "error: another process of the run has ended" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("quietly", [True, False])
def test_a_lost_worker_whose_pipe_has_closed_is_not_said_again_by_its_signal(quietly):
    script = (
        "import sys, time, torch.utils.data as data\n"
        "from latentcodec.training.loop import end_quietly\n"
        "batches = iter(data.DataLoader(range(99), num_workers=1))\n"
        "next(batches)\n"
        "if sys.argv[1] == 'True': end_quietly()\n"
        "batches._workers[0].kill()\n"
        "time.sleep(1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(quietly)], capture_output=True, text=True)
    assert ("Traceback" not in ended.stderr) == quietly, ended.stderr
