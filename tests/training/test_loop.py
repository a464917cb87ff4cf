"""Journeys through train/train.py: launchers, signals, several processes, users' mistakes, and what is left behind.

What needs no launcher runs inside this process, as its main program.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import AutoencoderKL
from rounding import AMPLIFIED, assert_equal_but_for_rounding
from small_runs import differing, everything, metrics, recorded, reset, small, write_config, write_images
from two_processes import LONGER

from latentcodec import LatentCodec, load_image
from latentcodec.pixels.labelled import LINE
from latentcodec.training import checkpoint
from latentcodec.training.console import end_at_interrupt
from latentcodec.training.data.images import open_images
from latentcodec.training.data.stream import training_batches
from latentcodec.training.lock import hold

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "train/train.py"
PATIENCE_SECONDS = 240  # of a test for a process; only a hang takes that long


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def run_train(monkeypatch, capfd):
    """train/train.py with some arguments, as the main program of this process: its exit code and its words."""

    def run(*arguments) -> tuple[int, str, str]:
        reset()
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TRAIN), run_name="__main__")
        said = capfd.readouterr()
        return end.value.code, said.out, said.err

    interrupted = signal.getsignal(signal.SIGINT)
    end_at_interrupt()  # as the main program does first, for as long as it lives
    yield run
    signal.signal(signal.SIGINT, interrupted)


def wait_until(condition, process=None) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it hangs"
        assert process is None or process.poll() is None, f"it ended with code {process.poll()}"
        time.sleep(0.02)


def lines(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def launch(*command, log: Path, **variables: str) -> subprocess.Popen:
    """A launcher in a session of its own, one thread a process, with these variables in its environment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | variables
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def processes_naming(folder: Path) -> list[int]:
    """The launcher, its processes and their data workers: whose command has the folder in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(folder) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return found


def rejects(output: Path) -> dict[str, str]:
    """rejects.jsonl: reasons by path, each image once."""
    listed = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    reasons = {line["path"]: line["reason"] for line in listed}
    assert len(reasons) == len(listed)
    return reasons


# ---- one process ----


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGTERM", 143),
        ("SIGINT", 130),
        pytest.param("SIGUSR1", 138, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_checkpoint_and_ends_with_its_code(tmp_path, images, run_train, name, code):
    output = tmp_path / "run"
    config = write_config(small(output, images, workers=2, max_steps=100_000), tmp_path / "config.yaml")
    number = getattr(signal, name)
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as after nohup")
    others = set(_children())  # of earlier tests, ended and not yet waited for

    def send() -> None:
        wait_until(lambda: lines(output) >= 2)
        signal.pthread_kill(threading.main_thread().ident, number)

    threading.Thread(target=send, daemon=True).start()
    handler = signal.getsignal(number)
    assert run_train("--config", config)[0] == code
    assert signal.getsignal(number) == handler
    assert checkpoint.newest(output / "checkpoints").step == metrics(output)[-1]["step"] >= 2
    wait_until(lambda: not set(_children()) - others)  # the data workers


def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path, images, monkeypatch):
    """There is nothing to save yet, and a process that waits for another one in vain may never take that step."""
    config = write_config(small(tmp_path / "run", images), tmp_path / "config.yaml")

    def wait_in_vain(*_) -> None:
        (tmp_path / "waiting").touch()
        time.sleep(60)

    monkeypatch.setattr("latentcodec.training.trainer.open_images", wait_in_vain)
    monkeypatch.setattr(sys, "argv", [str(TRAIN), "--config", str(config)])
    reset()
    child = os.fork()
    if child == 0:
        runpy.run_path(str(TRAIN), run_name="__main__")
        os._exit(0)
    wait_until((tmp_path / "waiting").exists)
    sent = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert time.monotonic() - sent < 10


def _children() -> list[int]:
    """Child processes but those that multiprocessing keeps for the whole session."""
    servers = "multiprocessing.resource_tracker", "multiprocessing.forkserver"
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it ends meanwhile
            if not any(server in " ".join(child.cmdline()) for server in servers):
                found.append(child.pid)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on the drawn set by `accelerate launch`, whose launcher is killed by SIGUSR1 on the way; resumed."""
    folder = tmp_path_factory.mktemp("journey")
    output = folder / "run"
    config = small(output, output, workers=1)
    config = replace(
        config,
        data=replace(config.data, path=None),
        train=replace(config.train, max_steps=16, checkpoint_every=5, validate_every=8),
        model=replace(config.model, init="linear", block_out_channels=[16, 16, 16]),
    )
    file = write_config(config, folder / "config.yaml")
    command = ("accelerate.commands.launch", TRAIN, "--config", file)
    launcher = launch(*command, log=folder / "first.log")
    wait_until(lambda: lines(output) >= 2, launcher)
    launcher.send_signal(signal.SIGUSR1)
    first = launcher.wait(PATIENCE_SECONDS)
    wait_until(lambda: not processes_naming(file))
    stopped_at = checkpoint.newest(output / "checkpoints").step
    launcher = launch(*command, log=folder / "second.log")
    second = launcher.wait(PATIENCE_SECONDS)
    return {
        "config": config,
        "output": output,
        "codes": (first, second),
        "stopped_at": stopped_at,
        "log": (folder / "second.log").read_text(),
    }


@pytest.mark.slow
def test_a_signal_to_accelerate_launch_ends_in_a_checkpoint_and_the_same_command_resumes(finished):
    assert finished["codes"] == (-signal.SIGUSR1, 0)
    assert 2 <= finished["stopped_at"] < 16
    assert f"resumed {finished['output']} at step {finished['stopped_at']}" in finished["log"]
    assert "Traceback" not in finished["log"]
    assert [line["step"] for line in metrics(finished["output"]) if "total" in line] == [*range(1, 17)]


@pytest.mark.slow
def test_the_config_it_leaves_repeats_the_run_bit_for_bit(finished, tmp_path, run_train):
    left = finished["output"] / "config.yaml"
    assert run_train("--config", left, "--output_dir", tmp_path / "again")[0] == 0
    assert metrics(tmp_path / "again") == metrics(finished["output"])
    weights = "codec/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (finished["output"] / weights).read_bytes()


@pytest.mark.slow
def test_the_finished_command_changes_nothing_and_says_so(finished, run_train):
    output = finished["output"]

    def contents():
        return {
            path: path.read_bytes() for path in output.rglob("[!.]*") if path.is_file()
        }  # .lock names a process

    files = contents()
    code, said, _ = run_train("--config", output / "config.yaml")
    assert code == 0
    assert "is finished" in said
    assert files == contents()


@pytest.mark.slow
def test_the_codec_loads_in_stock_diffusers_and_its_latents_have_unit_variance(finished):
    folder, config = finished["output"] / "codec", finished["config"]
    codec, stock = LatentCodec.from_pretrained(folder), AutoencoderKL.from_pretrained(folder).eval()
    images = open_images(config.data, 3, config.train.seed)
    crops = next(iter(training_batches(images, config.train.statistics_images, steps=1)))["pixels"]
    z = codec.encode(crops)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    with torch.no_grad():
        raw = stock.encode(crops).latent_dist.mode()
        y = stock.decode(raw).sample
    torch.testing.assert_close(raw, z * codec.latents_std + codec.latents_mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(y, codec.decode(z), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_leaves_pictures_scores_and_a_card(finished):
    output = finished["output"]
    assert sorted(path.name for path in (output / "samples").iterdir()) == [
        "step-00000008.png",
        "step-00000016.png",
    ]
    x = load_image(output / "samples/step-00000016.png")
    lines = 4 * LINE  # the names of the images, and a label above each of three rows
    assert x.shape[-1] / (x.shape[-2] - lines) == pytest.approx(2 / 3, rel=0.05)  # two images by three rows
    score = [line for line in metrics(output) if "psnr" in line][-1]
    result = json.loads((output / "result.json").read_text())
    assert (result["step"], result["psnr"].hex()) == (16, score["psnr"])
    assert f"{result['psnr']:.2f} dB" in (output / "codec/README.md").read_text()


def test_corrupt_images_are_left_out_counted_and_listed_once(tmp_path, images, run_train):
    config = small(tmp_path / "run", write_images(tmp_path / "images"), max_steps=12, validate_every=0)
    opened = open_images(config.data, 3, config.train.seed)
    numbers = [opened.val[0], opened.train[0], opened.train[5]]  # one of them held out
    broken = sorted(Path(opened.source.name(number)) for number in numbers)
    for file in broken:
        file.write_bytes(b"broken")
    code, said, _ = run_train("--config", write_config(config, tmp_path / "config.yaml"))
    assert code == 3
    listed = rejects(tmp_path / "run")
    assert sorted(listed) == [str(file) for file in broken]
    assert all("not an image" in reason for reason in listed.values()), listed
    assert "left out (3 so far, all in rejects.jsonl)" in said
    assert run_train("--config", tmp_path / "config.yaml")[0] == 3, (
        "it is finished, and there still is something to see"
    )


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


# ---- users' mistakes ----


def no_images(folder: Path) -> Path:
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    return folder


def only_corrupt_images(folder: Path) -> Path:
    write_images(folder)
    for file in folder.iterdir():
        file.write_bytes(b"broken")
    return folder


def tiny_images(folder: Path) -> Path:
    return write_images(folder, side=8)


def a_file(path: Path) -> Path:
    path.write_text("precious")
    return path


def below_a_file(path: Path) -> Path:
    return a_file(path.with_name("file.txt")) / "run"


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"data.path": no_images}, ["{data.path}"]),
        ({"data.path": "/nowhere/at/all"}, ["/nowhere/at/all"]),
        ({"data.path": only_corrupt_images}, ["{data.path}", "validation images"]),
        ({"data.path": only_corrupt_images, "data.val_images": 0}, ["{data.path}"]),
        ({"data.path": tiny_images}, ["{data.path}", "smaller than 11 pixels", "data.val_path"]),
        ({"data.val_images": 12}, ["data.val_images"]),
        ({"output_dir": a_file}, ["error: no checkpoints", "{output_dir}", "is a file"]),
        ({"output_dir": below_a_file}, ["error: no checkpoints", "file.txt is a file"]),
        ({"output_dir": "/proc/nowhere"}, ["/proc/nowhere"]),
        ({"data.resolution": 30}, ["data.resolution", "30", "factor 4"]),
        ({"discriminator.weight": 1, "data.resolution": 16}, ["discriminator.layers 3", "24", "16"]),
        ({"loss.lpips_weight": 1, "data.resolution": 8}, ["loss.lpips_net vgg", "16", "8"]),
        (
            {"loss.lpips_weight": 1, "loss.lpips_net": "alex", "regularizer.equivariance_probability": 0.5},
            ["loss.lpips_net alex", "31", "of 8"],
        ),
        ({"loss.lpips_weight": 1, "loss.lpips_weights": "/nowhere.safetensors"}, ["/nowhere.safetensors"]),
        ({"train.mixed_precision": "fp16"}, ["train.mixed_precision", "fp16"]),
        ({"train.trackers": "[abacus]"}, ["abacus"]),
        ({"train.trackers": "[tensorboard,dvclive]"}, ["train.trackers: dvclive is not installed"]),
        ({"model.from_pretrained": "/nowhere"}, ["/nowhere"]),
    ],
    ids=lambda value: "-".join(value),  # the keys; a function's own name would hold its address
)
def test_a_mistake_gives_one_line_that_names_it(tmp_path, images, run_train, settings, names):
    def made(value):
        return value(tmp_path / value.__name__) if callable(value) else value

    settings = {"data.path": images, "output_dir": tmp_path / "run"} | {
        k: made(v) for k, v in settings.items()
    }
    config = write_config(small(tmp_path / "run", images), tmp_path / "config.yaml")
    code, _, error = run_train("--config", config, *(f"--{key}={value}" for key, value in settings.items()))
    assert code == 2
    *_, error = error.splitlines()  # after what else a run says
    assert error.startswith("error: "), error
    for name in names:
        assert (str(settings[name[1:-1]]) if name.startswith("{") else name) in error, error


HOLDER = """
import sys, time
from pathlib import Path
from latentcodec.training.lock import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("removed", [False, True], ids=["there", "removed by hand"])
def test_a_folder_in_which_another_run_writes_is_refused_until_that_one_is_gone(
    tmp_path, images, run_train, removed
):
    output = tmp_path / "run"
    unfinished = output / "checkpoints/.tmp-step-00000001-4711"  # the checkpoint that the other run is saving
    unfinished.mkdir(parents=True)
    config = write_config(small(output, images, max_steps=1), tmp_path / "config.yaml")
    command = [sys.executable, "-c", HOLDER, output]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        if removed:
            (output / ".lock").unlink()
        code, _, error = run_train("--config", config)
        holder.kill()
    assert code == 2
    assert f"{output} is that of another run, process {'unknown' if removed else holder.pid}" in error
    assert list(output.glob("[!.]*")) == [output / "checkpoints"]
    assert unfinished.exists()
    assert run_train("--config", config)[0] == 0
    assert not unfinished.exists()


def test_a_run_needs_no_name_of_its_user(tmp_path, monkeypatch):
    """As under `docker run --user 12345`, where nothing but the number is known."""

    def unknown(*arguments):
        raise KeyError("getpwuid(): uid not found: 12345")

    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    hold(tmp_path)
    assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_what_a_compiled_codec_cannot_do_is_refused(tmp_path, images, run_train, monkeypatch):
    """accelerate launch --dynamo_backend says so to the process by this variable."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    config = write_config(small(tmp_path / "run", images), tmp_path / "config.yaml")
    code, _, error = run_train("--config", config, "--discriminator.weight=1", "--discriminator.layers=1")
    assert code == 2
    assert "--dynamo_backend" in error
    assert "discriminator.adaptive false" in error


def test_the_checkpoint_of_another_architecture_is_refused_before_the_data_is_read(
    tmp_path, images, run_train
):
    config = write_config(small(tmp_path / "run", images, max_steps=1), tmp_path / "config.yaml")
    assert run_train("--config", config)[0] == 0
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    arguments = ["--model.latent_channels=8", "--train.max_steps=2", "--data.path=/nowhere"]
    code, _, error = run_train("--config", config, *arguments)
    assert code == 2
    assert error.splitlines()[-1].startswith("error: ") or "error: the checkpoint" in error
    assert "model.latent_channels: 4 in the checkpoint, 8 now" in error
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path, images, run_train):
    (tmp_path / "locked").mkdir(mode=0o555)
    config = write_config(small(tmp_path / "locked/run", images), tmp_path / "config.yaml")
    code, _, error = run_train("--config", config)
    assert code == 1
    assert str(tmp_path / "locked/run") in error
