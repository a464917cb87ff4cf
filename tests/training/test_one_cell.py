"""Latents of one cell, as in the classic experiments: the linear start keeps their size, and a sigma for each pixel."""

from dataclasses import replace

import pytest
import torch
from small_runs import small, start, train

from latentcodec.codec import LatentCodec
from latentcodec.quality.klt import KLT
from latentcodec.training.config import parse
from latentcodec.training.data.config import DataConfig
from latentcodec.training.data.images import open_images
from latentcodec.training.data.stream import training_batches
from latentcodec.training.losses.terms import PIXEL_STEP, LossConfig, gaussian_nll
from latentcodec.training.start.model import ModelConfig, TrainedCodec, new_vae

DIGITS = DataConfig(
    drawn="digits", padding=2, resolution=32, min_scale=1.0, flip=False, val_images=2, workers=0
)
ONE_CELL = ModelConfig(
    image_channels=1, latent_channels=2, block_out_channels=[8, 16, 32, 32, 32, 32], norm_num_groups=2
)


def test_the_linear_start_reaches_codes_of_one_cell_at_their_own_size():
    """Group norm on a map of one cell would leave the direction of a code alone: the pinned norm keeps its length."""
    images = open_images(DIGITS, 1, 0)
    (batch,) = training_batches(images, 128, steps=1)
    x = batch["pixels"]
    codec = LatentCodec(new_vae(ONE_CELL, None, None, lambda: [*x]))
    z, expected = (c.encode(x)[:, :, 0, 0] for c in (codec, KLT.fit([*x], 32, 2)))
    for ours, exact in zip(z.T, expected.T, strict=True):
        assert torch.corrcoef(torch.stack([ours, exact]))[0, 1] > 0.95
    assert z.norm(dim=1).max() > 5 * z.norm(dim=1).min()


def pixel_run(tmp_path, **settings):
    config = small(tmp_path / "run", tmp_path, **settings)
    model = replace(config.model, image_channels=1)
    return replace(config, data=DIGITS, model=model, loss=LossConfig(scale="per_pixel", kl_weight=1.0))


def test_every_pixel_learns_a_scale_that_the_saved_codec_knows_nothing_of(tmp_path):
    trainer = start(pixel_run(tmp_path, max_steps=3, lr=1e-2))
    plain = start(replace(pixel_run(tmp_path), output_dir=str(tmp_path / "plain"), loss=LossConfig()))
    before = {name: value.clone() for name, value in trainer.state.codec.pixel_scale.state_dict().items()}
    assert train(trainer) == 0
    after = trainer.state.codec.pixel_scale.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    saved = LatentCodec.from_pretrained(tmp_path / "run/codec")
    keys = set(saved.vae.state_dict())
    wanted = set(plain.state.ema.state_dict()) | {
        f"{a}.{b}" for a in ("quant_conv", "post_quant_conv") for b in ("weight", "bias")
    }
    assert keys == wanted
    latent = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        y, log_scale = trainer.state.codec.decode(latent)
    assert y.shape == log_scale.shape == (2, 1, 32, 32)
    assert not trainer.state.codec.vae.decoder.conv_out._forward_pre_hooks


def test_a_run_with_a_scale_for_each_pixel_resumes_to_the_bit(tmp_path):
    whole = start(pixel_run(tmp_path, max_steps=4))
    train(whole)
    config = replace(pixel_run(tmp_path, max_steps=4), output_dir=str(tmp_path / "two"))
    train(start(config), stop_at=2)
    again = start(config)
    train(again)
    for name, value in whole.state.codec.state_dict().items():
        assert torch.equal(value, again.state.codec.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"loss\.scale per_pixel"):
        start(replace(config, loss=LossConfig(kl_weight=1.0)))


def test_the_scale_begins_at_one_and_stays_above_a_level_of_8_bits():
    codec = TrainedCodec(new_vae(replace(ONE_CELL, init="default"), None, None, list), "per_pixel", False)
    latent = torch.randn(2, 2, 1, 1)
    with torch.no_grad():
        _, log_scale = codec.decode(latent)
        torch.testing.assert_close(log_scale, torch.zeros(2, 1, 32, 32), rtol=0, atol=1e-5)
        codec.pixel_scale.conv.bias.fill_(-100.0)
        assert codec.decode(latent)[1].exp().min().item() == pytest.approx(PIXEL_STEP)


def test_a_scale_for_each_pixel_gives_the_likelihood_pixel_by_pixel():
    y, x, log_scale = (torch.randn(2, 1, 4, 5) for _ in range(3))
    expected = -torch.distributions.Normal(y, log_scale.exp()).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_nll(y, x, log_scale), expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("--loss.likelihood bernoulli", "loss.likelihood bernoulli has no scale for each pixel"),
        ("--loss.likelihood student_t", "loss.likelihood student_t has no scale for each pixel"),
        ("--loss.learn_scale true", "leave out loss.learn_scale"),
        ("--regularizer.scale_equivariance_weight 1", "scale_equivariance_weight"),
    ],
)
def test_what_contradicts_a_scale_for_each_pixel_is_refused(capsys, settings, said):
    with pytest.raises(SystemExit):
        parse(["--output_dir", "x", "--loss.scale", "per_pixel", *settings.split()])
    assert said in capsys.readouterr().err


def test_somebody_may_look_after_every_step(tmp_path):
    from latentcodec.training import loop
    from latentcodec.training.signals import StopRequest

    seen = []
    trainer = start(replace(pixel_run(tmp_path, max_steps=3), loss=LossConfig()))
    loop.train(trainer, StopRequest(), lambda looked: seen.append(looked.state.step))
    assert seen == [1, 2, 3]
