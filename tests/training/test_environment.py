"""What surrounds a run changes no number and ends in words: variables, shared memory, streams, interrupts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import metrics, new_trainer, small, start, train

from latentcodec.training import console, environment, loop
from latentcodec.training.data import stream
from latentcodec.training.data.config import DataConfig
from latentcodec.training.data.images import open_images
from latentcodec.training.loop import main

ROOT = Path(__file__).parents[2]


# ---- variables of the environment ----


def grad_norms(folder):
    return [line["grad_norm"] for line in metrics(folder) if "grad_norm" in line]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.001"),
        ("ACCELERATE_DOWNCAST_BF16", "yes"),
    ],
)
def test_the_environment_changes_no_number_and_is_said_to_be_passed_over(
    key, value, tmp_path, images, monkeypatch, capsys
):
    train(start(small(tmp_path / "peace", images, max_steps=2)))
    monkeypatch.setenv(key, value)
    train(start(small(tmp_path / "told", images, max_steps=2)))
    assert grad_norms(tmp_path / "told") == grad_norms(tmp_path / "peace")
    assert f"{key}={value} in the environment is passed over" in capsys.readouterr().out


@pytest.mark.parametrize("key", environment.REFUSED)
def test_the_environment_asks_for_no_shards(key, tmp_path, images, monkeypatch):
    monkeypatch.setenv(key, "true")
    with pytest.raises(ValueError, match=f"{key} is set"):
        new_trainer(small(tmp_path, images))
    monkeypatch.setenv(key, "false")
    new_trainer(small(tmp_path, images))


@pytest.mark.parametrize("count", environment.COUNTS)
def test_processes_that_do_not_know_of_one_another_are_refused(count, monkeypatch):
    for name in (*environment.COUNTS, *environment.RANKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(count, "2")
    with pytest.raises(ValueError, match=f"{count} is 2 and RANK is not set"):
        environment.take_environment()
    monkeypatch.setenv("RANK", "0")
    assert environment.take_environment() == []
    monkeypatch.delenv("RANK")
    monkeypatch.setenv(count, "1")
    assert environment.take_environment() == []


def test_an_unknown_precision_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match=r"ACCELERATE_MIXED_PRECISION is fp8: set train\.mixed_precision"):
        environment.take_environment()


# ---- shared memory, terminals, signals ----


def test_batches_go_through_pipes_where_shared_memory_is_too_small(tmp_path, images, monkeypatch):
    config = DataConfig(path=str(images), resolution=32, val_images=0, workers=2)
    opened = open_images(config, 3, 0)
    expected = list(stream.training_batches(opened, 4, steps=5))
    monkeypatch.setattr(stream, "SHARED_MEMORY_RESERVE", 1e12)
    with pytest.warns(stream.SharedMemoryWarning, match="sent through pipes"):
        batches = stream.training_batches(opened, 4, steps=5)
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch["pixels"], other["pixels"])
        assert torch.equal(batch["position"], other["position"])


def test_a_stream_that_fails_ends_nothing(tmp_path):
    script = (
        "import sys; from latentcodec.training.console import survive_broken_streams; survive_broken_streams()\n"
        "for _ in range(3): print('x' * 100_000)\n"
        "print('end', file=sys.stderr)"
    )
    variables = os.environ | {"PYTHONPATH": str(ROOT), "SCRIPT": script}
    for redirection in ("> /dev/full", ">&-", "| true"):
        command = ["bash", "-o", "pipefail", "-c", f"'{sys.executable}' -c \"$SCRIPT\" {redirection}"]
        done = subprocess.run(command, env=variables, capture_output=True, check=False)
        assert (done.returncode, done.stderr.strip()) == (0, b"end"), redirection
    command = ["bash", "-c", f"'{sys.executable}' -c \"$SCRIPT\" 2>/dev/full"]
    assert subprocess.run(command, env=variables, stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_an_interrupt_before_the_first_step_is_one_line():
    script = (
        "import os, signal; from latentcodec.training.console import end_at_interrupt\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); end_at_interrupt()\n"  # shells ignore it after `&`
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr.decode().strip() == console.INTERRUPTED.strip()


def test_an_interrupt_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        console.end_at_interrupt()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "words",
    ["DataLoader worker (pid 7) is killed by signal: Killed. ", "Pin memory thread exited unexpectedly"],
)
def test_a_lost_data_worker_is_one_line_in_whichever_words_torch_says_it(monkeypatch, capsys, words):
    """With a GPU a thread reads what workers send, and ends with the one that is killed while it does."""

    def run(config, stop):
        raise RuntimeError(words)

    monkeypatch.setattr(loop, "run", run)
    for name in ("parse", "survive_broken_streams", "end_at_interrupt", "end_quietly", "StopRequest"):
        monkeypatch.setattr(loop, name, lambda *arguments: None)
    assert main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a data worker was ended from outside" in line
    assert words.strip() in line
