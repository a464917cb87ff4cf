"""Stops, kills and the gradient scaler of fp16 change no bit of a run: each against one that nothing disturbed."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from image_sets import write_folder, write_set
from small_runs import Killed, Stop, differing, everything, metrics, new_trainer, small, start, state, train

from latentcodec.engine import layers
from latentcodec.training import checkpoint


@pytest.fixture(scope="module")
def peace(tmp_path_factory, images):
    """A run with everything on that nothing disturbed: its folder and its final state."""
    output = tmp_path_factory.mktemp("peace") / "run"
    trainer = start(everything(small(output, images)))
    train(trainer)
    return output, state(trainer)


# ---- stopped and resumed ----


@pytest.mark.parametrize(
    "stop",
    [
        {"stop_at": 3},
        {"kill_at": 5},
        pytest.param({"stop_at": 4}, marks=pytest.mark.slow),
        pytest.param({"kill_at": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_is_bit_identical_to_one_that_was_never_stopped(tmp_path, images, peace, stop):
    config = everything(small(tmp_path / "run", images))
    train(start(config), **stop)
    trainer = start(config)
    assert trainer.state.step == stop.get("stop_at", stop.get("kill_at", 0) // 2 * 2)
    train(trainer)
    assert differing(state(trainer), peace[1]) == []
    assert metrics(tmp_path / "run") == metrics(peace[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there are fewer than four cores
@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resume_in_the_middle_of_an_epoch_is_bit_identical_with_workers(tmp_path, images, workers):
    def config(name, workers):
        return everything(small(tmp_path / name, images, workers, accumulation=2, max_steps=4))

    undisturbed = start(config("peace", 0))
    train(undisturbed)
    train(start(config("run", workers)), kill_at=3)
    trainer = start(config("run", workers))
    assert trainer.state.draw * 4 % len(trainer.images.train) > 0
    train(trainer)
    assert differing(state(trainer), state(undisturbed)) == []
    assert metrics(tmp_path / "run") == metrics(tmp_path / "peace")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["buckets", "streaming"])
def test_a_run_over_buckets_or_a_stream_is_resumed_bit_for_bit_too(tmp_path, kind):
    data = tmp_path / "data"
    if kind == "buckets":
        for size in ((96, 48), (48, 96), (64, 64)):
            write_folder(data / f"{size}", 5, size)
    else:
        data.mkdir()
        data = write_set(data, "parquet", range(12))

    def config(name):
        run = small(tmp_path / name, data, max_steps=6, validate_every=0)
        return replace(run, data=replace(run.data, resolution=96, **{kind: True}))

    shapes = set()
    train(start(config("peace")), spoil=lambda _, batches: shapes.add(batches[0]["pixels"].shape))
    assert len(shapes) > 1 or kind == "streaming"
    train(start(config("run")), kill_at=3)
    train(start(config("run")))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "peace")


def test_a_run_that_is_asked_to_stop_saves_before_it_validates(tmp_path, images, monkeypatch):
    """A launcher may kill it within the validation, or before the codec is written."""
    trainer = start(small(tmp_path / "run", images))
    saved = []

    def be_killed():
        saved.append(checkpoint.newest(tmp_path / "run/checkpoints").step)
        raise Killed

    monkeypatch.setattr(trainer.exporter, "validate", be_killed)
    train(trainer, stop_at=4)
    assert saved == [4]


def test_a_finished_run_changes_nothing_when_it_is_run_again(tmp_path, images):
    config = small(tmp_path / "run", images, max_steps=2)
    train(start(config))
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    trainer = start(config)
    assert trainer.finished
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert json.loads((tmp_path / "run/result.json").read_text())["step"] == 2


def test_a_run_killed_in_its_finish_finishes_once(tmp_path, images, peace):
    config = everything(small(tmp_path / "run", images))
    trainer = start(config)
    train(trainer, stop_at=6)  # stopped at its last step: nothing is left but the finish
    trainer.exporter.validate()  # of a finish that a kill cut short
    trainer = start(config)
    assert not trainer.finished
    train(trainer)
    assert metrics(tmp_path / "run") == metrics(peace[0])


# ---- fp16: its gradient scaler, tried where there is no half precision ----


def with_scaler(trainer, scale):
    """Scale losses and gradients as in fp16, but compute in float32, where powers of two change no bit."""
    accelerator = trainer.accelerator
    accelerator.scaler = trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.autocast = nullcontext
    return trainer


def test_the_gradient_scaler_of_fp16_changes_nothing_but_the_range(tmp_path, images, peace):
    trainer = with_scaler(start(everything(small(tmp_path / "run", images))), 2.0**10)
    train(trainer)
    assert differing(state(trainer), peace[1]) == []


def test_an_overflow_in_fp16_halves_the_scale_and_is_no_bad_step(tmp_path, images, monkeypatch):
    monkeypatch.setattr(layers, "applies_to", lambda x: False)  # torch's norms overflow sooner
    trainer = with_scaler(start(everything(small(tmp_path / "run", images))), 2.0**127)
    before = state(trainer)
    for micro_batches in trainer.steps(Stop()):
        if trainer.train_step(micro_batches) is not None:
            break
        assert differing(state(trainer), before) == []
    assert trainer.state.step == 1
    assert trainer.state.draw > 3
    assert trainer.state.rollbacks == 0
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (127 - trainer.state.draw + 1)


def test_a_run_goes_on_in_fp16_with_the_scale_it_had_or_looks_for_one(tmp_path, images):
    config = small(tmp_path / "run", images)
    train(start(config), stop_at=1)  # without a scaler
    trainer = with_scaler(new_trainer(config), 2.0**10)
    trainer.resume()
    assert trainer.accelerator.scaler.get_scale() == 2.0**10
    train(trainer, stop_at=2)
    trainer = with_scaler(new_trainer(config), 2.0**3)
    trainer.resume()
    assert (trainer.state.step, trainer.accelerator.scaler.get_scale()) == (2, 2.0**10)
