"""A student and its teacher: the units of the anchor, the drift, the linear start, and a distillation."""

import math

import pytest
import torch
from small_runs import metrics, start, train
from starting_codecs import copy_of, crops, no_crops, reported, run_of, saved, tiny

from latentcodec.codec import LatentCodec
from latentcodec.latents import Normalisation, fold, latent_statistics
from latentcodec.training.losses.objective import Inputs
from latentcodec.training.losses.teacher import Teacher, anchor_loss, deviation_loss
from latentcodec.training.start.linear import linear_start
from latentcodec.training.start.model import ModelConfig, new_vae
from latentcodec.vae.posterior import mean_and_logvar


def teacher_of(vae, gives_latents=False):
    return Teacher(LatentCodec(vae), 1.0, gives_latents, bfloat16=False)


def test_the_anchor_is_in_units_of_the_teachers_deviation():
    unit = torch.tensor([2.0, 0.5])[:, None, None]
    target = torch.randn(3, 2, 4, 4)
    off = target + 3 * unit * torch.tensor([1.0, -1.0, 0.0])[:, None, None, None]
    assert torch.allclose(anchor_loss(off, target, unit), torch.tensor([9.0, 9.0, 0.0]), atol=1e-5)
    doubled = deviation_loss(target + 2 * math.log(2), target)
    assert torch.allclose(doubled, torch.full((3,), math.log(2) ** 2), atol=1e-5)


def test_the_decoder_learns_from_the_teachers_draw_where_it_should():
    vae = tiny()
    x, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 4, 4)
    inputs = Inputs(x, x, noise, [lambda z: 10 * z], x)
    with torch.no_grad():  # as the teacher runs
        mean, logvar = mean_and_logvar(vae.encode(x).latent_dist.parameters)
    lesson, changed = teacher_of(vae, gives_latents=True).lesson(inputs)
    assert torch.equal(lesson.mean, mean)
    drawn = 10 * (mean + (logvar / 2).exp() * noise)
    assert torch.allclose(changed.transform(torch.zeros_like(noise)), drawn, atol=1e-5)
    _, unchanged = teacher_of(vae).lesson(inputs)
    assert torch.equal(unchanged.transform(noise), 10 * noise)


def test_the_drift_is_the_rms_in_the_teachers_units_and_the_correlation():
    vae = tiny()
    student = copy_of(vae)
    x = torch.stack(crops())
    teacher = teacher_of(vae)
    still = teacher.drift(student, x.split(3))
    assert still.rms == 0
    assert still.correlation == pytest.approx([1, 1, 1, 1])
    student.encoder.conv_out.bias[:4] += 1  # half of the teacher's deviation, which its scale says to be 2
    student.encoder.conv_out.weight[0] *= -1
    moved = teacher.drift(student, x.split(3))
    student_z, teacher_z = (codec.encode(x).latent_dist.mode() for codec in (student, vae))
    assert moved.rms == pytest.approx(((student_z - teacher_z) / 2).square().mean().sqrt().item(), rel=1e-5)
    assert moved.correlation == pytest.approx([-1, 1, 1, 1])


def test_the_linear_start_of_a_student_is_the_teachers_where_that_is_linear():
    settings = ModelConfig(latent_channels=4, block_out_channels=[16, 16, 16], norm_num_groups=2, teacher="x")
    pictures = crops(32)
    x = torch.stack(pictures)
    linear = tiny(block_out_channels=[16, 16, 16])
    linear_start(linear, pictures)
    fold(
        linear,
        Normalisation(*(torch.randn(4, 4).double() for _ in "WV"), torch.randn(4).double(), torch.zeros(4)),
    )
    linear.register_to_config(scaling_factor=1 / latent_statistics(linear, [x]).std.mean().item())
    teacher = teacher_of(linear)
    drift = teacher.drift(new_vae(settings, None, teacher, lambda: pictures), [x])
    assert drift.rms < 0.1
    assert min(drift.correlation) > 0.99
    nonlinear = teacher_of(tiny())
    student = new_vae(settings, None, nonlinear, lambda: pictures)
    assert min(nonlinear.drift(student, [x]).correlation) > 0.2
    y = student.decode(nonlinear.latents(pictures)).sample
    assert (y - x).square().mean() < 0.9 * x.var()  # it decodes the teacher's latents, not its own


def test_distillation_reaches_the_teachers_latents_and_hands_on_its_numbers(tmp_path, images):
    source = saved(tiny(), tmp_path / "teacher")
    model = ModelConfig(
        latent_channels=4,
        block_out_channels=[8, 8, 16],
        norm_num_groups=2,
        init="default",
        teacher=source,
        teacher_latents=True,
    )
    trainer = start(run_of(tmp_path / "run", images, model, max_steps=16, checkpoint_every=8, lr=1e-2))
    train(trainer)
    anchors = reported(tmp_path / "run", "anchor")
    assert sum(anchors[-3:]) < 0.7 * sum(anchors[:3])
    drifts = reported(tmp_path / "run", "latent_drift")
    assert len(drifts) == 2
    assert drifts[1] < drifts[0]
    codec, teacher = (LatentCodec.from_pretrained(path) for path in (tmp_path / "run/codec", source))
    assert torch.equal(codec.latents_std, teacher.latents_std)
    assert codec.vae.config.shift_factor == 0.25
    assert f"off by {drifts[1]:.4f}" in (tmp_path / "run/codec/README.md").read_text()


@pytest.mark.slow
def test_a_distillation_that_was_stopped_goes_on_bit_for_bit(tmp_path, images):
    model = ModelConfig(
        latent_channels=4,
        block_out_channels=[16, 16, 16],
        norm_num_groups=2,
        teacher=saved(tiny(), tmp_path / "teacher"),
        teacher_latents=True,
    )
    undisturbed, config = (run_of(tmp_path / name, images, model, max_steps=4) for name in ("peace", "run"))
    train(start(undisturbed))
    train(start(config), kill_at=3)
    train(start(config))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "peace")


def test_a_teacher_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"model\.teacher has latent_channels 4, the codec .* has 16"):
        new_vae(ModelConfig(teacher="x"), None, teacher_of(tiny()), no_crops)
