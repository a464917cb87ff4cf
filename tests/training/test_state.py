"""What a resume brings back: all that a step has changed, also from checkpoints of the layout before `TrainState`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import differing, everything, new_trainer, small, start, state, train, write_images

from latentcodec.training.checkpoint import newest
from latentcodec.training.losses.regularizers import RegularizerConfig
from latentcodec.training.state import saved_state

OLD = Path(__file__).with_name(
    "before_train_state"
)  # a run's checkpoints/ as version 0.1 left it, at step 3 of 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def old_config(output):
    """The configuration of the run that wrote OLD."""
    config = everything(small(output, Path("unused"), validate_every=0, keep_last=1))
    return replace(
        config,
        model=replace(config.model, latent_channels=2, block_out_channels=[4, 4]),
        data=replace(config.data, path=None),
        regularizer=RegularizerConfig(
            equivariance_probability=0.5, low_resolution_probability=0.25, scale_equivariance_weight=0.1
        ),
        discriminator=replace(config.discriminator, channels=4),
    )


def test_a_checkpoint_of_the_layout_before_is_resumed_and_ends_as_a_run_of_today(tmp_path):
    shutil.copytree(OLD, tmp_path / "old/checkpoints")
    saved = newest(tmp_path / "old/checkpoints")
    trainer = start(old_config(tmp_path / "old"))
    resumed = trainer.state
    assert (resumed.step, resumed.draw, resumed.seconds) == (3, 3, saved.state["seconds"])
    for name, module in (
        ("model", resumed.codec),
        ("ema", resumed.ema),
        ("discriminator", resumed.adversary.plain),
    ):
        for key, value in saved.tensors(name).items():
            assert torch.equal(module.state_dict()[key], value), f"{name}.{key}"
    assert saved.state["rate"].items() <= resumed.rate.state_dict().items()
    assert resumed.adversary.numbers() == saved.state["adversary"]
    train(trainer)
    today = start(old_config(tmp_path / "today"))
    begin = torch.cat([p.detach().flatten() for p in today.gradients.parameters])
    train(today)
    old, new = (torch.cat([p.detach().flatten() for p in t.gradients.parameters]) for t in (trainer, today))
    assert (old - new).norm() <= 0.01 * (new - begin).norm()  # three steps were rounded on another machine


def test_a_state_that_was_saved_and_loaded_is_the_same_to_the_bit(tmp_path, images):
    trainer = start(everything(small(tmp_path / "run", images)))
    train(trainer, stop_at=3)
    before = state(trainer)
    saved = saved_state(newest(tmp_path / "run/checkpoints"))
    other = new_trainer(everything(small(tmp_path / "run", images)))
    assert differing(state(other), before)
    other.state.load_state_dict(saved)
    assert differing(state(other), before) == []


def test_a_resume_counts_the_minutes_that_were_trained_before(tmp_path, images):
    config = small(tmp_path / "run", images)
    trainer = start(config)
    trainer.state.seconds = 3600.0
    train(trainer, stop_at=2)
    assert trainer.state.seconds > 3600
    resumed = start(config)
    assert resumed.state.seconds == trainer.state.seconds
    train(resumed)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    minutes = [line["minutes"] for line in lines]
    assert minutes == sorted(minutes)
    assert minutes[0] > 60
    assert json.loads((tmp_path / "run/result.json").read_text())["minutes"] == minutes[-1]


def test_a_rollback_takes_weights_back_but_neither_time_nor_place_in_the_stream(tmp_path, images):
    trainer = start(small(tmp_path / "run", images))
    train(trainer, stop_at=2)
    saved, before = saved_state(newest(tmp_path / "run/checkpoints")), state(trainer)
    trainer.stopped_by = 0
    train(trainer, stop_at=4)
    draw, seconds = trainer.state.draw, trainer.state.seconds
    trainer.state.bad_steps = 3
    trainer.state.roll_back(saved)
    assert differing(state(trainer), before) == []
    assert (trainer.state.draw, trainer.state.seconds) == (draw, seconds)
    assert (trainer.state.bad_steps, trainer.state.rollbacks) == (0, 1)
