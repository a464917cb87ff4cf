"""Journeys through train/train.py in one process: launchers, signals, and what is left behind.

What needs no launcher runs inside this process, as its main program. Several processes are in test_two_processes.py.
"""

import json
import os
import runpy
import signal
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
from launched_runs import PATIENCE_SECONDS, TRAIN, launch, lines, processes_naming, rejects, wait_until
from small_runs import metrics, reset, small, write_config, write_images

from latentcodec import LatentCodec, load_image
from latentcodec.pixels.labelled import LINE
from latentcodec.training import checkpoint
from latentcodec.training.data.images import open_images
from latentcodec.training.data.stream import training_batches


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
