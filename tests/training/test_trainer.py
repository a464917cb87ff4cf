"""What a step does with the weights: both players' gradients, precision, clipping, averages, the learning rate.

Several processes are in test_two_processes.py.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from rounding import AMPLIFIED, assert_equal_but_for_rounding
from small_runs import Stop, everything, metrics, new_trainer, recorded, small, start, train

from latentcodec.training.losses.discriminator import DiscriminatorConfig
from latentcodec.training.optim.schedule import ema_decay, learning_rate, parameter_groups, update_ema


def test_accumulated_micro_batches_equal_one_batch(tmp_path, images):
    one = recorded(everything(small(tmp_path / "one", images, batch_size=4)))
    other = recorded(everything(small(tmp_path / "two", images, batch_size=1, accumulation=4)))
    assert_equal_but_for_rounding(one, other)
    norms, others = (
        [float.fromhex(line["grad_norm"]) for line in metrics(tmp_path / name) if "grad_norm" in line]
        for name in ("one", "two")
    )
    assert others == pytest.approx(norms, rel=AMPLIFIED)  # before clipping, which would hide a common factor


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


def test_an_alarm_sounds_when_the_discriminator_has_won(tmp_path, images):
    config = everything(small(tmp_path / "run", images))
    config = replace(config, discriminator=replace(config.discriminator, alarm_after_steps=2))
    trainer = start(config)
    step = trainer.state.adversary.step
    trainer.state.adversary.step = lambda report: step(report | {"d_accuracy": 1.0})
    with pytest.warns(UserWarning, match=r"the discriminator has won.*lower discriminator\.lr"):
        train(trainer, kill_at=4)


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


def test_shards_of_two_optimizers_are_refused_and_not_tried(tmp_path, images, monkeypatch):
    sharded = SimpleNamespace(mixed_precision="no", distributed_type=DistributedType.FSDP, log_with=[])
    monkeypatch.setattr("latentcodec.training.preflight.Accelerator", lambda **_: sharded)
    with pytest.raises(ValueError, match=r"FSDP cannot train .*torchrun"):
        new_trainer(small(tmp_path / "run", images))


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
