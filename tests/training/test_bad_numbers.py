"""A step whose numbers are not finite changes nothing; many in a row go back to the last checkpoint, or give up."""

import json
from dataclasses import replace

import pytest
import torch
from small_runs import Stop, bad_draws, differing, everything, metrics, small, start, state, train

from latentcodec.training import checkpoint
from latentcodec.training.trainer import Diverged


def spoil_pixel(value):
    def spoil(trainer, micro_batches):
        micro_batches[-1]["pixels"][0, 0, 3, 3] = value

    return spoil


def spoil_loss(trainer, micro_batches):
    losses = trainer.objective.losses

    def infinite(*arguments):
        values, weights = losses(*arguments)
        return values | {"nll": values["nll"] * torch.inf}, weights

    trainer.objective.losses = infinite


def spoil_gradient(player):
    """One gradient of the codec or of the discriminator, while every loss is finite."""

    def spoil(trainer, micro_batches):
        module = trainer.state.codec if player == "codec" else trainer.state.adversary.plain
        parameter = next(p for p in module.parameters() if p.requires_grad)
        handle = parameter.register_hook(lambda gradient: gradient * torch.nan)
        return handle.remove

    return spoil


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (spoil_pixel(torch.nan), "total"),
        pytest.param(spoil_pixel(torch.inf), "total", marks=pytest.mark.slow),
        pytest.param(spoil_loss, "nll", marks=pytest.mark.slow),
        pytest.param(spoil_gradient("codec"), "grad_norm", marks=pytest.mark.slow),
        (spoil_gradient("discriminator"), "d_grad_norm"),
    ],
    ids=["nan pixel", "inf pixel", "inf loss", "nan gradient", "nan gradient of the discriminator"],
)
def test_a_bad_number_changes_nothing_and_is_listed(tmp_path, images, spoil, name):
    trainer = start(everything(small(tmp_path / "run", images, accumulation=2)))
    train(trainer, kill_at=3)
    losses, before, draw = trainer.objective.losses, state(trainer), trainer.state.draw
    steps = trainer.steps(Stop())
    micro_batches = next(steps)
    undo = spoil(trainer, micro_batches)
    assert trainer.train_step(micro_batches) is None
    assert differing(state(trainer), before) == []
    (line,) = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert (skipped["step"], skipped["draw"]) == (3, draw)
    assert name in skipped["not_finite"]
    assert skipped["positions"] == list(range(4 * draw, 4 * draw + 4))
    # The next step is as good as if there had been no such batch: no gradient of it is left anywhere.
    trainer.objective.losses = losses
    if undo is not None:
        undo()
    after = next(steps)
    report = trainer.train_step(after)
    assert report is not None
    undisturbed = start(everything(small(tmp_path / "run", images, accumulation=2)))
    train(undisturbed, kill_at=3)
    undisturbed.state.draw += 1
    undisturbed.train_step(next(undisturbed.steps(Stop())))
    assert differing(state(trainer), state(undisturbed)) == []


def test_three_bad_steps_in_a_row_roll_back_and_training_goes_on_behind_them(tmp_path, images, capsys):
    config = everything(small(tmp_path / "run", images))
    at = {}

    def spoil(trainer, micro_batches):
        at.setdefault(trainer.state.step, state(trainer))
        if trainer.state.draw == 6:  # the first good batch after the three bad ones
            assert (trainer.state.step, trainer.state.rollbacks) == (2, 1)
            assert differing(state(trainer), at[2]) == []
        bad_draws(3, 4, 5)(trainer, micro_batches)

    trainer = start(config)
    train(trainer, spoil=spoil)
    assert "back to the checkpoint of step 2" in capsys.readouterr().out
    assert (trainer.state.step, trainer.state.draw) == (6, 10)  # draws 0-1, 2, three bad ones, 6-9
    assert [line["step"] for line in metrics(tmp_path / "run") if "total" in line] == [1, 2, 3, 4, 5, 6]
    lines = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["draw"] for line in lines] == [3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [{"kill_at": 3}, {"stop_at": 5}], ids=str)
def test_a_resume_after_a_rollback_is_bit_identical_too(tmp_path, images, kill_at):
    """kill_at 3: the checkpoint is from before the bad batches, which are met again. stop_at 5: from behind them."""
    config = everything(small(tmp_path / "peace", images))
    undisturbed = start(config)
    train(undisturbed, spoil=bad_draws(3, 4, 5))
    config = replace(config, output_dir=str(tmp_path / "run"))
    train(start(config), spoil=bad_draws(3, 4, 5), **kill_at)
    trainer = start(config)
    assert trainer.state.draw == (2 if "kill_at" in kill_at else 9)
    train(trainer, spoil=bad_draws(3, 4, 5))
    assert differing(state(trainer), state(undisturbed)) == []
    assert metrics(tmp_path / "run") == metrics(tmp_path / "peace")
    skipped = [(tmp_path / name / "skipped.jsonl").read_text() for name in ("run", "peace")]
    assert skipped[0] == skipped[1]


def test_a_rollback_past_a_damaged_checkpoint_commits_that_step_again(tmp_path, images):
    trainer = start(small(tmp_path / "run", images))

    def spoil(trainer, micro_batches):
        if trainer.state.draw == 4:
            next((tmp_path / "run/checkpoints/step-00000004").glob("*.safetensors")).write_bytes(b"")
        bad_draws(4, 5, 6)(trainer, micro_batches)

    with pytest.warns(checkpoint.CheckpointWarning, match="step-00000004"):
        train(trainer, spoil=spoil)
    assert trainer.state.step == 6
    assert checkpoint.newest(tmp_path / "run/checkpoints").step == 6
    assert (tmp_path / "run/checkpoints/step-00000004.1").exists()


def test_a_run_that_diverges_again_and_again_gives_up_and_leaves_its_checkpoint(tmp_path, images):
    trainer = start(small(tmp_path / "run", images))
    with pytest.raises(Diverged, match=r"training diverges: 4 times .*train\.lr") as error:
        train(trainer, spoil=bad_draws(*range(3, 100)))
    assert "\n" not in str(error.value)
    assert len((tmp_path / "run/skipped.jsonl").read_text().splitlines()) == 12
    assert checkpoint.newest(tmp_path / "run/checkpoints").step == 2
