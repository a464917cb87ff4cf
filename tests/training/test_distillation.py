"""The distilling configurations of train/configs, in small: a student of a tiny teacher learns to see and to draw."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from small_runs import start, train, write_images

sys.path.insert(0, str(Path(__file__).parents[1] / "vae"))
from small_vaes import small_vae

from latentcodec import LatentCodec
from latentcodec.pixels import load_image
from latentcodec.quality.metrics import psnr
from latentcodec.training.config import parse

CONFIGS = Path(__file__).parents[2] / "train/configs"
STEPS = 200
LEAST_GAIN = 2.0  # dB
SMALL_RUN = {
    "model.block_out_channels": "[16, 16, 32, 32]",
    "model.init": "default",
    "data.resolution": 64,
    "data.val_resolution": 64,
    "data.val_images": 8,
    "data.workers": 0,
    "train.max_steps": STEPS,
    "train.batch_size": 4,
    "train.lr": 2e-3,
    "train.mixed_precision": "no",
    "train.threads": 1,
    "train.validate_every": STEPS // 2,
    "train.checkpoint_every": STEPS,
    "train.statistics_images": 8,
}
TEACHERS = {
    "flux2": dict(latent_channels=32),
    "qwen": dict(z_dim=16, latents_mean=[0.1] * 16, latents_std=[1.2] * 16),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("flux2", "flux2"), ("qwen-image", "qwen")])
def test_a_student_gains_psnr_on_its_own_and_on_its_teachers_latents(name, kind, tmp_path):
    torch.manual_seed(0)
    teacher = LatentCodec(small_vae(kind, **TEACHERS[kind]))
    teacher.save_pretrained(tmp_path / "teacher" / "vae")
    images = write_images(tmp_path / "images", count=48, side=64)
    keys = SMALL_RUN | {
        "output_dir": tmp_path / "run",
        "data.path": images,
        "model.teacher": tmp_path / "teacher",
    }
    options = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    config = parse(["--config", str(CONFIGS / f"distill-{name}.yaml"), *options])
    trainer = start(config)
    x = torch.stack([load_image(path) for path in sorted(images.glob("*"))[:8]]).flatten(0, 1)
    before = drawn_by(LatentCodec(copy.deepcopy(trainer.state.ema)), teacher, x)
    train(trainer)
    student = LatentCodec.from_pretrained(tmp_path / "run/codec")
    after = drawn_by(student, teacher, x)
    print(f"{name}: {before} -> {after} dB")
    assert all(gained > began + LEAST_GAIN for began, gained in zip(before, after, strict=True))


def drawn_by(student, teacher, x):
    """PSNR in dB of the student's pictures of its own latents, and of its teacher's."""
    results = []
    for source in (student, teacher):
        y = student.decode(source.encode(x), size=x.shape[-2:])
        results.append(psnr(y.clamp(-1, 1), x).mean().item())
    return results
