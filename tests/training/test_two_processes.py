"""Two processes of one run, and two machines as two agents of torchrun on one: they end as one process does."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from launched_runs import PATIENCE_SECONDS, ROOT, TRAIN, launch, lines, processes_naming, rejects, wait_until
from rounding import AMPLIFIED, assert_equal_but_for_rounding
from small_runs import differing, everything, metrics, recorded, small, write_config, write_images
from two_processes import LONGER

from latentcodec.training import checkpoint

# ---- two processes ----

TWO_PROCESSES = (
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    2,
    ROOT / "tests/two_processes.py",
)


@pytest.fixture(scope="module")
def two(tmp_path_factory, images):
    """What both processes of tests/two_processes.py have found, and how SIGTERM to torchrun has ended them."""
    out = tmp_path_factory.mktemp("two")
    for number in (1, 5, 7, 8):
        corrupt = images.with_name("corrupt")
        corrupt.exists() or write_images(corrupt)
        (corrupt / f"{number:02}.png").write_bytes(b"broken")
    write_config(small(out / "signal", images, workers=1, max_steps=100_000), out / "signal.yaml")
    launcher = launch(*TWO_PROCESSES, images, out, log=out / "log")
    wait_until(lambda: lines(out / "signal") >= 2, launcher)
    launcher.send_signal(signal.SIGTERM)
    code = launcher.wait(PATIENCE_SECONDS)
    found = [torch.load(out / f"found-{rank}.pt") for rank in (0, 1)]
    return {"out": out, "found": found, "code": code, "orphans": processes_naming(out)}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, images, two):
    one = recorded(everything(small(tmp_path / "one", images, batch_size=4)))
    for name in ("plain", "accumulated"):
        first, second = (found["equality"][name] for found in two["found"])
        assert differing(first, second) == []
        assert_equal_but_for_rounding(one, first)
    numbers = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (two["out"] / "plain/metrics.jsonl").read_text().splitlines()]
    for number, other in zip(numbers, others, strict=True):
        clocks = {key for key in number if "second" in key or "minute" in key}
        expected = {key: value for key, value in number.items() if key not in clocks}
        assert {key: other[key] for key in expected} == pytest.approx(expected, rel=10 * AMPLIFIED, abs=1e-6)


@pytest.mark.slow
def test_a_stop_heard_by_one_of_two_processes_stops_both_and_resumes_exactly(two):
    assert [(found["resume"]["step"], found["resume"]["signal"]) for found in two["found"]] == [(3, 15)] * 2
    for found in two["found"]:
        plain, resumed = found["equality"]["plain"], found["resume"]["record"]
        for name in ("gradient 5", "end", "averages", "discriminator", "latents"):
            assert torch.equal(plain[name], resumed[name]), name
    assert metrics(two["out"] / "plain") == metrics(two["out"] / "resumed")


@pytest.mark.slow
def test_a_bad_number_in_one_of_two_processes_changes_nothing_in_either(two):
    for found in two["found"]:
        states = found["bad_numbers"]["states"]
        assert differing(states[3], states[4]) == []
        assert differing(states[3], states[5]) == []
        assert differing(states[6], states[2]) == []  # rolled back to the checkpoint of step 2
        assert (found["bad_numbers"]["step"], found["bad_numbers"]["draw"]) == (6, 10)
    assert (
        differing(two["found"][0]["bad_numbers"]["states"][9], two["found"][1]["bad_numbers"]["states"][9])
        == []
    )
    skipped = [json.loads(line) for line in (two["out"] / "bad/skipped.jsonl").read_text().splitlines()]
    assert [line["positions"] for line in skipped] == [[*range(4 * n, 4 * n + 4)] for n in (3, 4, 5)]


@pytest.mark.slow
def test_images_rejected_by_any_process_are_listed_once(two):
    names = sorted(Path(path).name for path in rejects(two["out"] / "corrupt"))
    assert names == ["01.png", "05.png", "07.png", "08.png"]


@pytest.mark.slow
def test_a_signal_to_torchrun_ends_all_processes_with_a_checkpoint(two):
    assert two["code"] in (
        1,
        -signal.SIGABRT,
    )  # torchrun's own, whatever the processes return; seen: an abort
    assert two["orphans"] == []
    output = two["out"] / "signal"
    assert checkpoint.newest(output / "checkpoints").step == metrics(output)[-1]["step"] >= 2


# ---- two machines, as two agents of torchrun on one (docs/several-machines.md) ----


def launch_agent(port: int, *command, log: Path) -> subprocess.Popen:
    """One of two agents that meet at a port of this machine, with one process each."""
    meeting = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "run")
    shape = ("--nnodes", 2, "--nproc_per_node", 1, "--max_restarts", 3)
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return launch("torch.distributed.run", *shape, *meeting, *command, log=log, **variables)


def workers_of(agent: subprocess.Popen) -> list[int]:
    tasks = Path(f"/proc/{agent.pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.slow
def test_two_agents_of_which_one_loses_its_process_restart_and_end_as_an_undisturbed_run(tmp_path, images):
    undisturbed = launch(*TWO_PROCESSES, images, tmp_path, "peace", log=tmp_path / "peace.log")
    assert undisturbed.wait(PATIENCE_SECONDS) == 0
    output = tmp_path / "run"
    config = write_config(small(output, images, workers=1, **LONGER), tmp_path / "config.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [launch_agent(port, TRAIN, "--config", config, log=tmp_path / f"{n}.log") for n in (0, 1)]
    wait_until(lambda: lines(output) >= 7, agents[0])
    (worker,) = workers_of(agents[0])
    os.kill(worker, signal.SIGKILL)
    assert [agent.wait(PATIENCE_SECONDS) for agent in agents] == [0, 0]
    said = "".join((tmp_path / f"{n}.log").read_text() for n in (0, 1))
    assert f"resumed {output} at step" in said
    peace = tmp_path / "peace"
    assert metrics(output) == metrics(peace)
    weights = "codec/diffusion_pytorch_model.safetensors"
    assert (output / weights).read_bytes() == (peace / weights).read_bytes()
    assert processes_naming(config) == []
