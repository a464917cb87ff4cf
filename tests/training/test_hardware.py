"""Which number format and how many threads a run takes, and what a resume on another machine says."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from small_runs import new_trainer, small, start, train, write_images

from latentcodec import machine
from latentcodec.training import checkpoint, hardware
from latentcodec.training.checkpoint import Checkpoint
from latentcodec.training.hardware import LAUNCHER


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(autouse=True)
def as_started(monkeypatch):
    """The environment of a plain `accelerate launch`."""
    monkeypatch.setenv(LAUNCHER, "no")
    monkeypatch.setattr(machine, "emulation_cost", lambda dtype, device: 9.0)


@pytest.fixture
def units(monkeypatch):
    """Call with the dtype that this machine shall be fast in."""
    return lambda name: monkeypatch.setenv(machine.OVERRIDE, name)


def config(folder, images, **settings):
    return small(folder / "run", images, max_steps=2, **({"mixed_precision": "auto"} | settings))


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "bf16"), ("float32", "no")])
def test_auto_takes_what_the_machine_is_fast_in_and_keeps_it(
    tmp_path, images, units, capsys, dtype, precision
):
    units(dtype)
    trainer = start(config(tmp_path, images))
    assert trainer.accelerator.mixed_precision == precision
    assert capsys.readouterr().out.startswith(f"training in {dtype} on ")
    dtypes = set()
    trainer.state.codec.vae.encoder.conv_in.register_forward_hook(lambda _, x, y: dtypes.add(y.dtype))
    train(trainer)
    assert getattr(torch, dtype) in dtypes
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["train"]["mixed_precision"] == precision
    found = checkpoint.newest(tmp_path / "run/checkpoints")
    assert found.state["config"]["train"]["mixed_precision"] == precision
    assert found.state["machine"] == {"threads": 1, "instructions": machine.instruction_sets()}


def test_what_the_launcher_was_told_counts_and_the_setting_more(tmp_path, images, units, monkeypatch, capsys):
    units("float32")
    monkeypatch.setenv(LAUNCHER, "bf16")
    assert new_trainer(config(tmp_path, images)).accelerator.mixed_precision == "bf16"
    assert "warning: bfloat16 is slow on this machine or emulated" in (said := capsys.readouterr().out)
    assert "takes 9.0 times as long" in said
    assert new_trainer(config(tmp_path, images, mixed_precision="no")).accelerator.mixed_precision == "no"
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "then", "precision", "said"),
    [
        ("bfloat16", "float32", "bf16", "warning: bfloat16 is slow on this machine or emulated"),
        ("float32", "bfloat16", "no", "this run began in float32 and stays so"),
    ],
)
def test_a_resume_on_another_machine_keeps_the_format_and_says_so(
    tmp_path, images, units, capsys, first, then, precision, said
):
    units(first)
    train(start(config(tmp_path, images)), kill_at=2)
    units(then)
    capsys.readouterr()
    trainer = new_trainer(config(tmp_path, images))
    assert trainer.accelerator.mixed_precision == precision
    assert said in capsys.readouterr().out


def test_a_change_that_was_asked_for_is_said_and_done(tmp_path, images, units, capsys):
    units("float32")
    train(start(config(tmp_path, images)), kill_at=2)
    capsys.readouterr()
    trainer = new_trainer(config(tmp_path, images, mixed_precision="bf16"))
    assert trainer.accelerator.mixed_precision == "bf16"
    assert "train.mixed_precision was no up to step" in capsys.readouterr().out


def test_other_threads_and_instructions_are_said(tmp_path, images, units, capsys, monkeypatch):
    units("float32")
    monkeypatch.setattr(machine, "instruction_sets", lambda: ["avx2"])
    train(start(config(tmp_path, images)), kill_at=2)
    capsys.readouterr()
    new_trainer(config(tmp_path, images))
    assert "another machine" not in capsys.readouterr().out
    monkeypatch.setattr(machine, "instruction_sets", lambda: ["avx2", "avx512f"])
    new_trainer(config(tmp_path, images, threads=2))
    said = capsys.readouterr().out
    assert "written on another machine (threads 1, now 2; instructions avx2, now avx2 avx512f)" in said


@pytest.mark.parametrize("batch_size", [2, 4])
def test_another_number_of_processes_is_said_and_what_it_changes(
    tmp_path, images, capsys, monkeypatch, batch_size
):
    """Of two processes that stand for four of before: sums of the same images are rounded otherwise, others differ."""
    saved = Checkpoint(tmp_path, {"step": 5, "config": asdict(config(tmp_path, images)), "processes": 4})
    saved.state["global_batch"] = 8
    state = SimpleNamespace(device=torch.device("cpu"), num_processes=2, is_main_process=True)
    told = config(tmp_path, images, batch_size=batch_size, mixed_precision="no")
    monkeypatch.setattr(hardware, "gather_object", lambda objects: objects)
    notes = "\n".join(hardware.take_hardware(told, saved, state).notes)
    assert (
        "written by another number of processes (processes 4, now 2): sums are added in another order"
        in notes
    )
    assert ("to rounding only" in notes) == (batch_size == 4)
    halved = "the global batch was 8 images (processes: 4) up to step 5 and is 4 (processes: 2) from here on"
    assert (halved in notes) == (batch_size == 2)


def test_threads_are_the_cores_whatever_the_launcher_set(tmp_path, images, units, capsys, monkeypatch):
    units("float32")
    monkeypatch.setattr(machine, "physical_cores", lambda: 3)
    settings = config(tmp_path, images, threads="auto")
    assert new_trainer(settings).hardware.threads == torch.get_num_threads() == 3
    assert ": 3 threads" in capsys.readouterr().out.splitlines()[0]
    eight = replace(settings, data=replace(settings.data, workers=2))
    monkeypatch.setattr(machine, "physical_cores", lambda: 8)
    assert new_trainer(eight).hardware.threads == 6
