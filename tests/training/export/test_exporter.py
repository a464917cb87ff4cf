"""What a run shows of itself is of the averaged weights, not of those that the optimizer moves."""

import pytest
import torch
from diffusers import AutoencoderKL
from small_runs import small, start, train, write_images

from latentcodec.codec import LatentCodec
from latentcodec.quality.metrics import evaluate


@pytest.fixture
def trainer(tmp_path):
    """A run after two steps, whose averages lag behind its weights."""
    trainer = start(small(tmp_path / "run", write_images(tmp_path / "images"), lr=1e-2, warmup=0.0))
    train(trainer, stop_at=2)
    return trainer


def test_the_score_and_the_samples_are_those_of_the_averaged_weights(trainer):
    averaged, moved = (
        evaluate(LatentCodec(vae), trainer.held_out.images)
        for vae in (trainer.state.ema, trainer.state.codec.vae)
    )
    assert abs(averaged.mean("psnr") - moved.mean("psnr")) > 0.01
    assert trainer.exporter.validate().mean("psnr") == averaged.mean("psnr")


def test_the_saved_codec_has_the_averaged_weights_and_the_statistics_of_their_latents(trainer, tmp_path):
    trainer.exporter.save_codec()
    saved = AutoencoderKL.from_pretrained(tmp_path / "run/codec")
    for key, value in trainer.state.ema.state_dict().items():
        assert torch.equal(saved.state_dict()[key], value), key
    expected = trainer.exporter.latent_statistics()
    assert saved.config.latents_mean == pytest.approx(expected.mean.tolist(), rel=1e-5)
    assert saved.config.latents_std == pytest.approx(expected.std.tolist(), rel=1e-5)
