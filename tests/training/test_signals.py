"""The polite end of a run: a signal lets it save and leave with its code, and its data workers outlive it."""

import os
import signal
import time
from pathlib import Path

import pytest
from forked import start_child, status_of
from torch.utils.data import DataLoader

from latentcodec.training.data.stream import Batches
from latentcodec.training.signals import SIGNALS, StopRequest, exit_code, shield_data_worker


def loop(ready: Path, save_seconds: float = 0.0) -> int:
    """A training loop: steps until it is asked to stop, saves, leaves. Its file tells how far it got."""
    deadline = time.monotonic() + 20
    with StopRequest() as stop:
        ready.write_text("stepping")
        while not stop.received:
            assert time.monotonic() < deadline, "nobody asked for a stop"
            time.sleep(0.005)
        ready.write_text("saving")
        time.sleep(save_seconds)
        ready.write_text("saved")
        return exit_code(stop.received)


def wait_for(file: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while not (file.exists() and file.read_text() == text):
        assert time.monotonic() < deadline, f"{file} never said {text!r}"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138), ("SIGHUP", 129)]
)
def test_a_signal_lets_the_run_save_and_leave_with_its_code(tmp_path: Path, number: str, code: int):
    said = tmp_path / "said"
    child = start_child(lambda: loop(said))
    wait_for(said, "stepping")
    os.kill(child, signal.Signals[number])
    assert status_of(child) == code
    assert said.read_text() == "saved"


def test_a_second_interrupt_ends_the_process_at_once_but_not_the_echo_of_the_first(tmp_path: Path):
    said = tmp_path / "said"
    child = start_child(lambda: loop(said, save_seconds=60))
    wait_for(said, "stepping")
    os.kill(child, signal.SIGINT)
    wait_for(said, "saving")
    os.kill(child, signal.SIGINT)  # a terminal's, after the launcher's
    time.sleep(1.1)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGINT)
    assert status_of(child) == -signal.SIGINT  # a shell says 130
    assert said.read_text() == "saving"


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE"])
def test_a_run_whose_launcher_dies_saves_and_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
):
    monkeypatch.setenv(variable, "1")
    said = tmp_path / "said"
    launcher = start_child(lambda: status_of(start_child(lambda: loop(said))))
    wait_for(said, "stepping")
    os.kill(launcher, signal.SIGKILL)
    assert status_of(launcher) == -signal.SIGKILL
    wait_for(said, "saved")


def test_a_launcher_that_died_before_the_run_began_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(os, "getppid", lambda: 4321)  # that of these tests may be process 1
    assert StopRequest().received == 0
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"/sbin/init\0")
    assert StopRequest().received == signal.SIGTERM
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"/usr/bin/python\0/usr/bin/torchrun\0train.py\0")
    assert StopRequest().received == 0  # a container's first process may be the launcher


def test_a_run_without_a_launcher_outlives_its_shell(tmp_path: Path):
    said = tmp_path / "said"

    def shell() -> int:
        (tmp_path / "pid").write_text(str(start_child(lambda: loop(said))))
        wait_for(said, "stepping")
        return 0

    assert status_of(start_child(shell)) == 0
    time.sleep(0.1)
    assert said.read_text() == "stepping"
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    wait_for(said, "saved")


def test_a_signal_that_is_ignored_stays_ignored_as_after_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_data_workers_outlive_a_signal_to_the_whole_process_group(tmp_path: Path, number: str):
    said = tmp_path / "said"

    def train() -> int:
        os.setpgid(0, 0)
        with StopRequest() as stop:
            loader = DataLoader(range(10**6), num_workers=2, worker_init_fn=shield_data_worker)
            for count, _ in enumerate(loader):
                if count == 10:
                    said.write_text("stepping")
                if stop.received and not count_at_stop:
                    count_at_stop.append(count)
                if count_at_stop and count == count_at_stop[0] + 20:  # more batches than were prefetched
                    said.write_text("saved")
                    return exit_code(stop.received)
        return 1

    count_at_stop: list[int] = []
    child = start_child(train)
    wait_for(said, "stepping")
    os.killpg(child, signal.Signals[number])
    assert status_of(child) == exit_code(signal.Signals[number])
    assert said.read_text() == "saved"


def test_a_signal_that_comes_before_a_data_worker_is_shielded_does_not_end_it():
    def late(worker: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        shield_data_worker(worker)

    batches = [{"position": position} for position in range(4)]
    loader = DataLoader(batches, num_workers=1, worker_init_fn=late, batch_size=None)
    assert [batch["position"] for batch in Batches(loader)] == [0, 1, 2, 3]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
