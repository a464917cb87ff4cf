"""Users' mistakes at the command line of train/train.py: each ends in one line that names it, and breaks nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import small, write_config, write_images

from latentcodec.training.lock import hold


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
    assert "error: the checkpoint" in error
    assert "model.latent_channels: 4 in the checkpoint, 8 now" in error
    assert "Traceback" not in error
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path, images, run_train):
    (tmp_path / "locked").mkdir(mode=0o555)
    config = write_config(small(tmp_path / "locked/run", images), tmp_path / "config.yaml")
    code, _, error = run_train("--config", config)
    assert code == 1
    assert str(tmp_path / "locked/run") in error
