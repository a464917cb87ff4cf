"""Whole runs that start from a codec: two processes as one, and the configurations that come with the project."""

from pathlib import Path

import pytest
import torch
from clean_processes import ranks, start_process
from small_runs import start, train
from starting_codecs import reported, run_of, saved, tiny
from torch import nn

from latentcodec.codec import LatentCodec
from latentcodec.training.config import Config, parse
from latentcodec.training.start.model import ModelConfig

# ---- two processes ----


def _trained_weights(config) -> list[torch.Tensor]:
    trainer = start(config)
    train(trainer)
    return [parameter.detach().clone() for parameter in trainer.state.codec.parameters()]


def _one_of_two(config, results) -> None:
    torch.save(_trained_weights(config), results)
    torch.distributed.destroy_process_group()


def _train_in_two_processes(config, results) -> None:
    processes = [
        start_process(results / f"{rank}.log", variables, _one_of_two, config, results / f"{rank}.pt")
        for rank, variables in enumerate(ranks(2))
    ]
    for rank, process in enumerate(processes):
        process.join(timeout=120)
        assert process.exitcode == 0, (results / f"{rank}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("follows", ["nobody", "its latents"])
def test_two_processes_fine_tune_and_finish_as_one_does(tmp_path, images, follows):
    source = saved(tiny(), tmp_path / "parent")
    # Another one than the parent: where both are the same, gradients are rounding alone, and Muon makes steps of it.
    teacher = None if follows == "nobody" else saved(tiny(), tmp_path / "teacher")
    model = ModelConfig(from_pretrained=source, teacher=teacher, teacher_latents=follows == "its latents")
    one, two = (
        run_of(tmp_path / name, images, model, max_steps=3, batch_size=size, checkpoint_every=9)
        for name, size in (("one", 4), ("two", 2))
    )
    _train_in_two_processes(two, tmp_path)
    expected = _trained_weights(one)
    for rank in range(2):
        for ours, theirs in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-5
    ours, theirs = (LatentCodec.from_pretrained(tmp_path / name / "codec") for name in ("two", "one"))
    assert torch.allclose(ours.latents_mean, theirs.latents_mean, atol=1e-4)
    assert torch.allclose(ours.latents_std, theirs.latents_std, rtol=1e-4)
    parent = LatentCodec.from_pretrained(source)
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        assert ours.vae.config[key] == parent.vae.config[key]
    drifts = [reported(tmp_path / name, "latent_drift") for name in ("one", "two")]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-4)
    assert bool(drifts[0]) == (follows != "nobody")


# ---- the configurations that come with the project ----


CONFIGS = Path(__file__).parents[3] / "train/configs"


def a_short_run_of(name, output, images, *settings) -> Config:
    """A configuration of the project on small crops: its recipe, but for what is given here."""
    small = ["resolution=32", "val_images=2", "val_resolution=32", "workers=0"]
    short = ["max_steps=24", "batch_size=4", "checkpoint_every=8", "statistics_images=8", "lr=5e-3"]
    arguments = [f"--data.{text}" for text in [f"path={images}", *small]] + [f"--train.{t}" for t in short]
    return parse(
        ["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", str(output), *arguments, *settings]
    )


@pytest.mark.slow
def test_the_distillation_configuration_brings_a_student_closer_to_its_teacher(tmp_path, images):
    teacher = f"--model.teacher={saved(tiny(), tmp_path / 'teacher')}"
    student = ["--model.block_out_channels=[16,16,16]", "--model.norm_num_groups=2"]
    train(start(a_short_run_of("distill-f8c4", tmp_path / "run", images, teacher, *student)))
    first, _, last = reported(tmp_path / "run", "latent_drift")
    assert last < 0.95 * first
    assert f"off by {last:.4f}" in (tmp_path / "run/codec/README.md").read_text()


class RandomFeatures(nn.Module):
    """In the place of LPIPS, whose trained network is no part of a checkout."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2))
        self.requires_grad_(False)

    def forward(self, y, x):
        return (self.features(y) - self.features(x)).square().mean((1, 2, 3))


@pytest.mark.slow
def test_the_decoder_configuration_lowers_its_perceptual_loss_and_keeps_the_latents(
    tmp_path, images, monkeypatch
):
    monkeypatch.setattr("latentcodec.quality.perceptual.load_lpips", lambda *_: RandomFeatures())
    source = saved(tiny(), tmp_path / "parent")
    parent = [f"--model.from_pretrained={source}", "--loss.lpips_net=squeeze"]
    train(start(a_short_run_of("finetune-decoder", tmp_path / "run", images, *parent)))
    distances = reported(tmp_path / "run", "lpips")
    assert sum(distances[-6:]) < 0.9 * sum(distances[:6])
    x = torch.rand(1, 3, 32, 40) * 2 - 1
    ours, theirs = (LatentCodec.from_pretrained(path).encode(x) for path in (tmp_path / "run/codec", source))
    assert torch.equal(ours, theirs)
