"""One step, many steps, stopped and resumed steps, spoiled steps: what a run may rely on, against an undisturbed run.

Several processes are in test_loop.py.
"""

import json
import resource
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from image_sets import write_folder, write_set
from small_runs import (
    Killed,
    Stop,
    differing,
    everything,
    metrics,
    new_trainer,
    recorded,
    small,
    start,
    state,
    train,
    write_images,
)

from latentcodec.engine import layers
from latentcodec.training import checkpoint, preflight
from latentcodec.training.losses.discriminator import DiscriminatorConfig
from latentcodec.training.optim.schedule import ema_decay, learning_rate, parameter_groups, update_ema
from latentcodec.training.trainer import Diverged

# The gradient of a step is a sum over its pixels, 4 x 32 x 32 here. Another order of the sum rounds otherwise: each
# of n additions by up to half of 2^-23, at random, so by sqrt(n) 2^-23 = 8e-6 of the gradient's norm altogether.
PIXELS = 4 * 32 * 32
ROUNDING = PIXELS**0.5 * 2**-23
# AdamW divides by the gradient's own size, so a weight with a gradient near zero may go the other way; Muon lifts the
# weakest directions of a gradient 3.4445^5 = 485 times. Such weights and directions are few: in norm, and measured by
# how far the weights have come, they add a digit and a half.
AMPLIFIED = 30 * ROUNDING


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def peace(tmp_path_factory, images):
    """A run with everything on that nothing disturbed: its folder and its final state."""
    output = tmp_path_factory.mktemp("peace") / "run"
    trainer = start(everything(small(output, images)))
    train(trainer)
    return output, state(trainer)


def relative(record, other, name, unit=None):
    size = (record[name] if unit is None else unit).norm()
    return ((record[name] - other[name]).norm() / size).item()


def assert_equal_but_for_rounding(one, other):
    """Two records of `small_runs.recorded`."""
    assert one.keys() == other.keys()
    assert torch.equal(one["begin"], other["begin"])
    way = one["end"] - one["begin"]
    assert relative(one, other, "gradient 0") <= ROUNDING
    for name in [name for name in one if name.startswith("gradient")]:
        assert relative(one, other, name) <= AMPLIFIED, name
    assert relative(one, other, "end", way) <= AMPLIFIED
    assert relative(one, other, "averages", way) <= AMPLIFIED
    assert relative(one, other, "discriminator") <= AMPLIFIED
    assert relative(one, other, "latents") <= AMPLIFIED


def test_accumulated_micro_batches_equal_one_batch(tmp_path, images):
    one = recorded(everything(small(tmp_path / "one", images, batch_size=4)))
    other = recorded(everything(small(tmp_path / "two", images, batch_size=1, accumulation=4)))
    assert_equal_but_for_rounding(one, other)
    norms, others = (
        [float.fromhex(line["grad_norm"]) for line in metrics(tmp_path / name) if "grad_norm" in line]
        for name in ("one", "two")
    )
    assert others == pytest.approx(norms, rel=AMPLIFIED)  # before clipping, which would hide a common factor


# ---- resume ----


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


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, 16),
        ({"batch_size": 2}, 16),
        ({"batch_size": 1, "accumulation": 4}, 16),
        ({"batch_size": 16}, 16),
        ({"batch_size": 6}, 18),  # rounded up to a whole step: no crop comes twice
    ],
    ids=str,
)
def test_a_run_of_another_batch_size_goes_on_behind_the_samples_it_has_drawn(
    tmp_path, images, capsys, settings, first
):
    config = small(tmp_path / "run", images, batch_size=4, validate_every=0)
    train(start(config), spoil=bad_draws(1), stop_at=3)  # four batches of four are drawn, one was skipped
    capsys.readouterr()
    trainer = start(replace(config, train=replace(config.train, **settings)))
    positions = [position for batch in next(trainer.steps(Stop())) for position in batch["position"].tolist()]
    said = capsys.readouterr().out
    now = trainer.hardware.global_batch
    assert positions == list(range(first, first + now))
    assert ("the global batch was" in said) == (now != 4)
    if now != 4:
        assert (
            f"the global batch was 4 images (processes: 1) up to step 3 and is {now} (processes: 1)" in said
        )
    (skipped,) = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["positions"] == [4, 5, 6, 7]
    trainer.state.draw += 1
    trainer.state.step += 1
    trainer.checkpoint()
    again = start(config)  # the batch of before
    assert again.state.draw == -(-(first + now) // 4)


def test_a_checkpoint_that_does_not_say_its_batch_goes_on_as_it_did(tmp_path, images, monkeypatch):
    config = small(tmp_path / "run", images, batch_size=4)
    train(start(config), stop_at=2)
    found = preflight.find_checkpoint
    monkeypatch.setattr(preflight, "find_checkpoint", lambda *told: without_batch(found(*told)))
    assert start(replace(config, train=replace(config.train, batch_size=2))).state.draw == 2


def without_batch(saved):
    del saved.state["global_batch"], saved.state["processes"]
    return saved


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


def test_a_finished_run_goes_on_when_it_is_given_more_steps(tmp_path, images):
    train(start(small(tmp_path / "run", images, max_steps=2, schedule="constant")))
    trainer = start(small(tmp_path / "run", images, max_steps=4, schedule="constant"))
    assert not trainer.finished
    train(trainer)
    assert [line["step"] for line in metrics(tmp_path / "run") if "total" in line] == [1, 2, 3, 4]


def test_settings_of_the_optimizers_are_those_of_the_command_and_not_of_the_checkpoint(tmp_path, images):
    config = everything(small(tmp_path / "run", images))
    train(start(config), stop_at=2)
    config = replace(
        config,
        train=replace(config.train, betas=(0.5, 0.6), weight_decay=0.7),
        discriminator=replace(config.discriminator, lr=0.123),
    )
    trainer = start(config)
    group = trainer.state.optimizer.param_groups[-1]
    assert (tuple(group["betas"]), group["weight_decay"]) == ((0.5, 0.6), 0.7)
    assert trainer.state.adversary.optimizer.param_groups[0]["lr"] == 0.123


@pytest.mark.parametrize("learned", [False, True])
def test_the_scale_is_that_of_the_command_unless_it_is_learned(tmp_path, images, learned):
    config = small(tmp_path / "run", images, validate_every=0)
    config = replace(config, loss=replace(config.loss, scale=0.5, learn_scale=learned))
    start(config)
    trainer = start(replace(config, loss=replace(config.loss, scale=0.25)))
    assert trainer.state.codec.log_scale.exp().item() == pytest.approx(0.5 if learned else 0.25)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "latent_channels", 8),
        ("model", "block_out_channels", [8, 16, 16]),
        ("model", "part", "decoder"),
        ("model", "init", "linear"),
        ("model", "from_pretrained", "photo-f8c16"),
        ("model", "subfolder", "vae"),
        ("model", "teacher", "photo-f8c16"),
        ("model", "teacher_subfolder", "vae"),
        ("train", "seed", 1),
        ("loss", "learn_scale", True),
        ("discriminator", "weight", 0.1),
    ],
)
def test_another_architecture_or_start_in_the_folder_is_refused_and_nothing_overwritten(
    images, refused, section, key, value
):
    files = {path: path.read_bytes() for path in refused.rglob("*") if path.is_file()}
    config = small(refused, images)
    config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    old, new = getattr(getattr(small(refused, images), section), key), value
    if key == "weight":
        key, old, new = "discriminator", "off", "on"
    with pytest.raises(ValueError, match=key) as error:
        new_trainer(config)
    assert f"{old} in the checkpoint, {new} now" in str(error.value)
    assert files == {path: path.read_bytes() for path in refused.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def refused(tmp_path_factory, images):
    output = tmp_path_factory.mktemp("refused") / "run"
    train(start(small(output, images)), stop_at=1)
    return output


def test_a_resume_removes_the_checkpoints_that_a_kill_kept_from_being_removed(tmp_path, images):
    output = tmp_path / "run"
    train(start(small(output, images, keep_last=3)))
    assert len(list((output / "checkpoints").iterdir())) == 3
    start(small(output, images, keep_last=1))
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_checkpoint_from_before_muon_names_who_can_resume_it(tmp_path, images, monkeypatch):
    config = small(tmp_path / "run", images)
    old = {key: value for key, value in preflight.fixed_settings(config).items() if key != "optimizer"}
    monkeypatch.setattr("latentcodec.training.preflight.fixed_settings", lambda config: old)
    start(config)
    with pytest.raises(ValueError, match="earlier version, before Muon, and only that version resumes it"):
        new_trainer(config)


def broadcast_from_main(monkeypatch, choice):
    monkeypatch.setattr(preflight, "broadcast_object_list", lambda objects: objects.__setitem__(0, choice))
    return SimpleNamespace(is_main_process=False, process_index=3)


def test_all_processes_go_on_from_the_checkpoint_of_the_main_process(tmp_path, monkeypatch):
    for step in (2, 4):
        checkpoint.save(tmp_path, step, tensors={}, objects={}, state={}, keep_last=2)
    other = broadcast_from_main(monkeypatch, "step-00000002")
    assert preflight.newest_checkpoint(tmp_path, other).step == 2
    (tmp_path / "step-00000002/state.json").write_text("{}")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"process 3 cannot use .*step-00000002.* same output_dir"
    ):
        preflight.newest_checkpoint(tmp_path, other)
    assert preflight.newest_checkpoint(tmp_path, broadcast_from_main(monkeypatch, None)) is None
    none = checkpoint.CheckpointError(74, "no checkpoint can be used")
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint can be used"):
        preflight.newest_checkpoint(tmp_path, broadcast_from_main(monkeypatch, none))


@pytest.mark.parametrize("name", ["codec", "metrics.jsonl"])
def test_a_folder_with_results_but_no_checkpoint_is_not_begun_anew(tmp_path, images, name):
    (tmp_path / name).mkdir() if name == "codec" else (tmp_path / name).write_text("precious\n")
    with pytest.raises(ValueError, match=name):
        new_trainer(small(tmp_path, images))
    assert (tmp_path / name).exists()


# ---- bad numbers ----


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
        trainer.undo = handle.remove

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
    spoil(trainer, micro_batches)
    assert trainer.train_step(micro_batches) is None
    assert differing(state(trainer), before) == []
    (line,) = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert (skipped["step"], skipped["draw"]) == (3, draw)
    assert name in skipped["not_finite"]
    assert skipped["positions"] == list(range(4 * draw, 4 * draw + 4))
    # The next step is as good as if there had been no such batch: no gradient of it is left anywhere.
    trainer.objective.losses = losses
    getattr(trainer, "undo", nullcontext)()
    after = next(steps)
    report = trainer.train_step(after)
    assert report is not None
    undisturbed = start(everything(small(tmp_path / "run", images, accumulation=2)))
    train(undisturbed, kill_at=3)
    undisturbed.state.draw += 1
    undisturbed.train_step(next(undisturbed.steps(Stop())))
    assert differing(state(trainer), state(undisturbed)) == []


def bad_draws(*draws):
    def spoil(trainer, micro_batches):
        if trainer.state.draw in draws:
            micro_batches[0]["pixels"][0] = torch.nan

    return spoil


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


# ---- the step's parts ----


def test_the_discriminator_takes_no_computation_before_its_start(tmp_path, images):
    config = small(tmp_path / "run", images, max_steps=3)
    config = replace(config, discriminator=DiscriminatorConfig(0.5, start_step=2, channels=8, layers=1))
    trainer = start(config)
    calls = []
    trainer.state.adversary.plain.register_forward_hook(lambda *_: calls.append(trainer.state.step))
    before = {key: value.clone() for key, value in trainer.state.adversary.plain.state_dict().items()}
    train(trainer, kill_at=2)
    assert calls == []
    assert all(
        torch.equal(value, before[key]) for key, value in trainer.state.adversary.plain.state_dict().items()
    )
    assert trainer.state.adversary.optimizer.state == {}
    train(trainer)
    assert {*calls} == {2}


def test_the_codec_gets_no_gradient_from_the_discriminator_nor_it_from_the_codec(tmp_path, images):
    """One step by hand, with plain autograd, against what the trainer leaves in both gradients."""
    config = everything(small(tmp_path / "run", images, clip_norm=1e30, batch_size=4))
    config = replace(config, discriminator=replace(config.discriminator, start_step=0))
    trainer = start(config)
    left = {}
    trainer.state.optimizer.step = lambda: left.update(
        codec=[p.grad.clone() for p in trainer.gradients.parameters]
    )
    plain = trainer.state.adversary.plain
    trainer.state.adversary.optimizer.step = lambda: left.update(
        plain=[p.grad.clone() for p in plain.parameters()]
    )
    (batch,) = next(trainer.steps(Stop()))
    trainer.train_step([batch])
    trainer.state.step = trainer.state.draw = 0
    trainer.objective.rate.reference.zero_()
    trainer.objective.rate.centre.zero_()
    trainer.objective.rate.deviation.fill_(1)  # as before the first step
    inputs = trainer.objective.inputs(batch["pixels"], batch["position"], 0, lambda y: y)
    result, vae = trainer.state.codec(inputs.x, inputs.noise, inputs.transform), trainer.state.codec.vae
    losses, weights = trainer.objective.losses(
        result, inputs, 0, 0, lambda z: vae.decode(z).sample, lambda y: vae.encode(y).latent_dist.mean
    )
    dimensions = inputs.target[0].numel()
    total = (
        sum(weights[k] * losses[k].mean() / (dimensions if k in ("nll", "kl") else 1) for k in losses)
        - 0.5 * plain(result.reconstruction).mean()
    )
    real, fake = plain(inputs.target), plain(result.reconstruction.detach())
    hinge = (torch.relu(1 - real) + torch.relu(1 + fake)).mean() / 2
    for loss, parameters, found in (
        (total, trainer.gradients.parameters, left["codec"]),
        (hinge, list(plain.parameters()), left["plain"]),
    ):
        expected = torch.autograd.grad(loss, parameters)
        error = torch.cat([(a - b).flatten() for a, b in zip(expected, found, strict=True)]).norm()
        assert error <= 1e-5 * torch.cat([g.flatten() for g in expected]).norm()


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_of_the_step_before(tmp_path, images):
    config = everything(small(tmp_path / "run", images, accumulation=2))
    trainer = start(config)
    noted, weight = [], trainer.state.adversary.weight

    def note(reconstruction, adversarial, last_layer, accumulation):
        pair = [
            torch.autograd.grad(x, last_layer, retain_graph=True)[0] for x in (reconstruction, adversarial)
        ]
        noted.append(pair)
        return weight(reconstruction, adversarial, last_layer, accumulation)

    trainer.state.adversary.weight = note
    train(trainer, kill_at=3)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "total" in line]
    assert "adversarial_weight" not in lines[0]
    assert lines[1]["adversarial_weight"] == 0.5  # the first one has no step before it
    reconstruction, adversarial = ((noted[0][i] + noted[1][i]) / 2 for i in (0, 1))
    expected = 0.5 * reconstruction.norm() / (adversarial.norm() + 1e-4)
    assert lines[2]["adversarial_weight"] == pytest.approx(expected.item(), rel=1e-5)


def test_bf16_autocast_keeps_float32_weights_and_moves_them(tmp_path, images):
    config = everything(small(tmp_path / "run", images, mixed_precision="bf16", lr=4.5e-6, warmup=0))
    trainer = start(config)
    before = [p.detach().clone() for p in trainer.gradients.parameters]
    seen = set()
    trainer.state.codec.vae.decoder.conv_out.register_forward_hook(lambda _, __, y: seen.add(y.dtype))
    train(trainer, kill_at=3)
    assert seen == {torch.bfloat16}
    tensors = [
        *trainer.state.codec.parameters(),
        *trainer.state.ema.parameters(),
        *trainer.state.adversary.plain.parameters(),
    ]
    tensors += [value for entry in trainer.state.optimizer.state.values() for value in entry.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    moved = sum((p != old).sum().item() for p, old in zip(trainer.gradients.parameters, before, strict=True))
    assert moved >= 0.99 * sum(
        p.numel() for p in trainer.gradients.parameters
    )  # at a rate where bf16 weights stand still


def test_gradients_are_clipped_to_the_norm(tmp_path, images):
    trainer = start(small(tmp_path / "run", images, clip_norm=0.01))
    norms = []
    step = trainer.state.optimizer.step
    trainer.state.optimizer.step = lambda: (
        norms.append(torch.cat([p.grad.flatten() for p in trainer.gradients.parameters]).norm().item()),
        step(),
    )
    train(trainer, kill_at=2)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-4)
    assert all(float.fromhex(line["grad_norm"]) > 0.011 for line in metrics(tmp_path / "run"))


def test_the_average_follows_the_weights_by_its_formula(tmp_path, images):
    trainer = start(small(tmp_path / "run", images))
    expected = [p.detach().double() for p in trainer.state.ema.parameters()]
    stream = trainer.steps(Stop())
    for step in range(3):
        trainer.train_step(next(stream))
        decay = min(0.9, (1 + step) / (10 + step))
        weights = trainer.state.codec.vae.parameters()
        expected = [
            decay * e + (1 - decay) * w.detach().double() for e, w in zip(expected, weights, strict=True)
        ]
    for average, e in zip(trainer.state.ema.parameters(), expected, strict=True):
        torch.testing.assert_close(average.double(), e, rtol=0, atol=1e-7)


def test_a_run_ends_when_its_minutes_are_over_and_its_bar_knows_how_many_steps_that_makes(tmp_path, images):
    trainer = start(small(tmp_path / "run", images, max_steps=100_000, max_minutes=1.5 / 60))
    for micro_batches in trainer.steps(Stop()):
        report = trainer.train_step(micro_batches)
        trainer.journal.log(trainer.state.step, trainer.progress, report)
        assert trainer.journal.bar.total == round(trainer.state.step / trainer.progress)
    assert 1.5 <= trainer.state.seconds < 10
    assert trainer.journal.bar.total == trainer.state.step < 1000
    assert report["lr"] < 1e-3 / 2  # the schedule has followed the clock


def test_the_share_of_waiting_for_data_can_be_read_from_the_metrics(tmp_path, images):
    trainer = start(small(tmp_path / "run", images, max_steps=3))
    read = trainer.images.source.read

    def slowly(index):
        time.sleep(0.05)
        return read(index)

    trainer.images.source.read = slowly
    train(trainer)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in [line for line in lines if "total" in line]:
        assert 0.1 <= line["waited_seconds"] <= line["step_seconds"]
        assert line["images_per_second"] == pytest.approx(2 / line["step_seconds"])


def test_the_wait_of_the_slowest_process_counts(tmp_path, images):
    trainer = start(small(tmp_path / "run", images, max_steps=2))
    other = torch.tensor(
        [0.0] * 3 + [9.0]
    )  # its notes: no time, no signal, nothing rejected, nine seconds of waiting
    gather = trainer.accelerator.gather
    trainer.accelerator.gather = lambda row: gather(
        torch.cat([row, torch.cat([row[:, :-4], other[None]], 1)])
    )
    assert trainer.train_step(next(trainer.steps(Stop())))["waited_seconds"] == 9


def test_a_stop_of_this_process_or_of_another_takes_no_minutes_of_training(tmp_path, images, monkeypatch):
    monkeypatch.setattr(
        "latentcodec.training.exchange.running_time", lambda: 7.0
    )  # a clock that stands still
    trainer = start(small(tmp_path / "run", images, max_steps=2))
    waited = torch.tensor([3600.0, 0, 0, 0])  # the notes of a process that waited an hour for this one
    gather = trainer.accelerator.gather
    trainer.accelerator.gather = lambda row: gather(
        torch.cat([row, torch.cat([row[:, :-4], waited[None]], 1)])
    )
    trainer.train_step(next(trainer.steps(Stop())))
    assert trainer.state.seconds == 0


def test_an_alarm_sounds_when_the_discriminator_has_won(tmp_path, images):
    config = everything(small(tmp_path / "run", images))
    config = replace(config, discriminator=replace(config.discriminator, alarm_after_steps=2))
    trainer = start(config)
    step = trainer.state.adversary.step
    trainer.state.adversary.step = lambda report: step(report | {"d_accuracy": 1.0})
    with pytest.warns(UserWarning, match=r"the discriminator has won.*lower discriminator\.lr"):
        train(trainer, kill_at=4)


def test_shards_of_two_optimizers_are_refused_and_not_tried(tmp_path, images, monkeypatch):
    sharded = SimpleNamespace(mixed_precision="no", distributed_type=DistributedType.FSDP, log_with=[])
    monkeypatch.setattr("latentcodec.training.preflight.Accelerator", lambda **_: sharded)
    with pytest.raises(ValueError, match=r"FSDP cannot train .*torchrun"):
        new_trainer(small(tmp_path / "run", images))


def test_a_full_disk_is_an_error_that_names_the_diary_and_its_bytes(tmp_path, images):
    trainer = start(small(tmp_path / "run", images))
    train(trainer, kill_at=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (trainer.journal.metrics.stat().st_size + 10, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"metrics\.jsonl cannot be written, it needs \d+ bytes: .*File too large"
        ):
            train(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    trainer = start(small(tmp_path / "run", images))  # half a line was written, and is forgotten
    train(trainer)
    assert [line["step"] for line in metrics(tmp_path / "run") if "total" in line] == [1, 2, 3, 4, 5, 6]


def test_samples_and_numbers_reach_tensorboard(tmp_path, images):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = start(small(tmp_path / "run", images, max_steps=2, trackers=["tensorboard"]))
    train(trainer)
    trainer.accelerator.end_training()
    (folder,) = (path.parent for path in (tmp_path / "run/latentcodec").glob("events*"))
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("total")] == [1, 2]
    assert events.Scalars("validation/psnr")[0].step == 2
    assert events.Images("samples")[0].width > events.Images("samples")[0].height / 3


# ---- how weights move ----


@pytest.mark.parametrize(
    ("schedule", "half", "end"), [("cosine", 0.5, 0), ("linear", 0.5, 0), ("constant", 1, 1)]
)
def test_the_learning_rate_rises_to_its_peak_and_falls_by_its_schedule(schedule, half, end):
    def rate(progress):
        return learning_rate(2.0, schedule, progress, 0.2)

    assert [rate(0), rate(0.1), rate(0.2)] == pytest.approx([0, 1, 2])
    assert [rate(0.6), rate(1)] == pytest.approx([2 * half, 2 * end])


def test_only_weights_decay_and_wide_layers_move_less():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(32, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(64, 4, 3)
    )
    groups = parameter_groups(model, 0.1)
    of = {id(p): group for group in groups for p in group["params"]}
    decay = [(of[id(p)]["weight_decay"], of[id(p)]["scale"]) for p in model.parameters()]
    assert decay == [(0.1, 1.0), (0, 1), (0, 1), (0, 1), (0.1, 0.5), (0, 1)]


def test_gains_of_rms_norms_are_no_matrices():
    """Those of Qwen-Image's and Wan's norms have the shape [C, 1, 1] or [C, 1, 1, 1]."""
    model = torch.nn.Module()
    model.down_blocks = torch.nn.ParameterDict(
        {"gamma": torch.ones(8, 1, 1), "weight": torch.ones(8, 1, 3, 3)}
    )
    model.norm_out, model.scale = (
        torch.nn.Parameter(torch.ones(8, 1, 1, 1)),
        torch.nn.Parameter(torch.zeros(())),
    )
    groups = parameter_groups(model, 0.1)
    of = {id(p): (group["orthogonal"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert of[id(model.down_blocks["weight"])] == (True, 0.1)
    for parameter in (model.down_blocks["gamma"], model.norm_out, model.scale):
        assert of[id(parameter)] == (False, 0)


def test_a_young_average_forgets_faster():
    assert [ema_decay(0.999, n) for n in (0, 90, 10**6)] == [0.1, 0.91, 0.999]
    average, model = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = 0.75 * average.weight.detach() + 0.25 * model.weight.detach()
    update_ema(average, model, 0.75)
    torch.testing.assert_close(average.weight.detach(), expected)
