"""What a run shows of itself is of the averaged weights, not of those that the optimizer moves."""

import pytest
import torch
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
    ema, codec = trainer.state.ema, LatentCodec.from_pretrained(tmp_path / "run/codec")
    folded = ("quant_conv.", "post_quant_conv.", "encoder.conv_out.", "decoder.conv_in.")
    for key, value in ema.state_dict().items():
        assert key.startswith(folded) or torch.equal(codec.vae.state_dict()[key], value), key
    assert codec.vae.config.latents_mean is None
    assert (codec.vae.config.scaling_factor, codec.vae.config.shift_factor) == (1.0, 0.0)
    expected, x = trainer.exporter.latent_statistics(), torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        raw = ema.encode(x).latent_dist.mode()
        mean, std = (value.float().view(-1, 1, 1) for value in (expected.mean, expected.std))
        torch.testing.assert_close(codec.encode(x), (raw - mean) / std, rtol=1e-4, atol=1e-4)
