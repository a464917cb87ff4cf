"""The finish of a run: the half-precision certificate, whitened latents, a share of the parent's weights."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from random_codecs import pictures, random_vae, raw
from small_runs import small, start, train, write_images

from latentcodec.codec import LatentCodec
from latentcodec.latents import latent_statistics
from latentcodec.quality.metrics import evaluate, reconstruct
from latentcodec.quality.precision import certify, extreme_images
from latentcodec.training.data.text import find_fonts
from latentcodec.training.export.codec_folder import FinishConfig, finish
from latentcodec.training.start.adapt import AdaptConfig
from latentcodec.training.start.linear import linear_start
from latentcodec.training.start.model import ModelConfig

# ---- half precision ----


def test_the_certificate_knows_the_largest_activation():
    vae, x = random_vae(), pictures(3)
    vae.decoder.conv_in.weight *= 1000
    certificate = certify(vae, list(x))
    h = vae.decoder.conv_in(raw(vae, x))
    assert certificate.activations["decoder.conv_in"][0] == pytest.approx(h.abs().max().item(), rel=1e-4)
    extreme = raw(vae, extreme_images(3, 32, 32))
    assert certificate.activations["encoder.conv_out"][1] == pytest.approx(
        extreme.abs().max().item(), rel=0.5
    )
    assert certificate.largest >= h.abs().max() * 0.999


def test_force_upcast_follows_the_measurement():
    x = list(pictures(2, 16))
    safe, overflowing = random_vae(), random_vae()
    overflowing.decoder.conv_in.weight *= 1e5
    card = finish(safe, None, None, x)
    assert safe.config.force_upcast is False
    assert "float16 is safe" in card
    assert "| bfloat16 | yes |" in card
    card = finish(overflowing, None, None, x)
    assert overflowing.config.force_upcast is True
    assert "| float16 | no | nan dB |" in card


def test_without_a_measurement_force_upcast_stays_on():
    vae = random_vae()
    vae.register_to_config(force_upcast=False)
    finish(vae, None, None, [])
    assert vae.config.force_upcast is True


def test_the_linear_start_fits_into_float16():
    vae, x = random_vae(block_out_channels=[16, 16, 16], norm_num_groups=2), pictures(16)
    linear_start(vae, list(x))
    certificate = certify(vae, list(x[:2]))
    assert certificate.float16_is_safe
    assert certificate.bfloat16.finite


def test_extreme_images_hold_only_black_and_white():
    images = extreme_images(4, 8, 6)
    assert images.shape == (6, 4, 8, 6)
    assert set(images.unique().tolist()) == {-1.0, 1.0}
    assert len(images.flatten(1).unique(dim=0)) == 6


# ---- the run ----


def test_a_run_ends_with_a_whitened_certified_codec(tmp_path):
    images = write_images(tmp_path / "images")
    config = small(tmp_path / "run", images, max_steps=2, checkpoint_every=1)
    config = replace(config, finish=FinishConfig(normalise="whitened", certificate_images=2))
    train(start(config), stop_at=1)
    halfway = AutoencoderKL.from_pretrained(tmp_path / "run/codec")
    assert halfway.config.force_upcast is True
    trainer = start(config)
    train(trainer)
    stock = AutoencoderKL.from_pretrained(tmp_path / "run/codec").eval()
    assert stock.config.force_upcast is False
    assert (stock.config.scaling_factor, stock.config.shift_factor, stock.config.latents_mean) == (1, 0, None)
    x = trainer.held_out.images[0][None]
    trained, saved = (reconstruct(LatentCodec(vae), x) for vae in (trainer.state.ema, stock))
    assert (trained - saved).abs().max() <= 2 / 255 + 1e-6  # at most one 8-bit step, where rounding was near
    card = (tmp_path / "run/codec/README.md").read_text()
    assert "Whitened" in card
    assert "Measured on 2 crops" in card


def test_a_fine_tuned_codec_may_be_whitened_anew(tmp_path, capsys):
    images, parent = write_images(tmp_path / "images"), random_vae()
    parent.register_to_config(scaling_factor=0.5, shift_factor=3.0)
    LatentCodec(parent).save_pretrained(tmp_path / "parent")
    config = small(tmp_path / "run", images, max_steps=1)
    config = replace(
        config,
        model=ModelConfig(from_pretrained=str(tmp_path / "parent")),
        finish=FinishConfig(normalise="whitened", certificate_images=0),
    )
    trainer = start(config)
    assert "a denoiser that was made for" in capsys.readouterr().out
    train(trainer)
    codec = LatentCodec.from_pretrained(tmp_path / "run/codec")
    assert (codec.vae.config.scaling_factor, codec.vae.config.shift_factor) == (1, 0)
    x = trainer.held_out.images[0][None]
    trained, saved = (reconstruct(LatentCodec(vae), x) for vae in (trainer.state.ema, codec.vae))
    assert (trained - saved).abs().max() <= 2 / 255 + 1e-6
    crops = torch.cat(list(trainer.exporter._crops(drawn=False)))
    statistics = latent_statistics(codec.vae, [crops])
    torch.testing.assert_close(
        statistics.covariance, torch.eye(codec.latent_channels).double(), atol=0.02, rtol=0
    )
    assert "Whitened" in (tmp_path / "run/codec/README.md").read_text()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_parents_weights_goes_into_the_codec_that_is_scored_and_saved(tmp_path, share):
    images, parent = write_images(tmp_path / "images"), random_vae()
    LatentCodec(parent).save_pretrained(tmp_path / "parent")
    config = small(tmp_path / "run", images, max_steps=2, lr=0.01, checkpoint_every=1)
    config = replace(
        config,
        model=ModelConfig(from_pretrained=str(tmp_path / "parent")),
        finish=FinishConfig(parent_share=share, certificate_images=0),
    )
    train(start(config), stop_at=1)
    trainer = start(config)  # goes on: the parent is the one that the run began with
    train(trainer)
    saved = LatentCodec.from_pretrained(tmp_path / "run/codec").vae.state_dict()
    before, trained = parent.state_dict(), trainer.state.ema.state_dict()
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    for name, value in saved.items():
        torch.testing.assert_close(value, share * before[name] + (1 - share) * trained[name])
    codec = LatentCodec.from_pretrained(tmp_path / "run/codec")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["psnr"] == pytest.approx(evaluate(codec, trainer.held_out.images).mean("psnr"), abs=1e-4)


@pytest.mark.parametrize("key", ["from_pretrained", "teacher"])
def test_another_parent_or_teacher_under_the_same_name_is_refused_and_nothing_overwritten(
    tmp_path, key, monkeypatch
):
    images = write_images(tmp_path / "images")
    LatentCodec(random_vae(latent_channels=4)).save_pretrained(tmp_path / "codec")
    config = small(tmp_path / "run", images, max_steps=4)
    config = replace(config, model=replace(config.model, **{key: str(tmp_path / "codec")}))
    train(start(config), stop_at=2)
    start(config)  # the same one
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    torch.manual_seed(1)  # a run sets it as well
    LatentCodec(random_vae(latent_channels=4)).save_pretrained(tmp_path / "codec")
    with pytest.raises(
        ValueError, match=rf"model\.{key} names another codec .*Bring back the codec of before"
    ):
        start(config)
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr(
        "latentcodec.training.trainer.fingerprints", lambda *_: {}
    )  # as a checkpoint of before has it
    older = replace(config, output_dir=str(tmp_path / "older"))
    start(older)
    monkeypatch.undo()
    assert start(older).codecs


@pytest.mark.parametrize("model", [{}, dict(from_pretrained="x", adapt=AdaptConfig(latent_channels=8))])
def test_a_share_of_a_parent_that_is_not_there_is_refused(tmp_path, model):
    config = small(tmp_path / "run", tmp_path)
    with pytest.raises(ValueError, match=r"finish\.parent_share 0\.5 needs a model\.from_pretrained"):
        replace(config, model=ModelConfig(**model), finish=FinishConfig(parent_share=0.5))


def test_latents_are_measured_on_pictures_with_nothing_drawn_over_them(tmp_path):
    try:
        find_fonts()
    except ValueError:
        pytest.skip("this machine has no fonts")
    config = small(tmp_path / "run", write_images(tmp_path / "images"), max_steps=1)
    drawn = replace(config, data=replace(config.data, text_share=1.0), output_dir=str(tmp_path / "drawn"))
    means = [start(each).exporter.latent_statistics().mean for each in (config, drawn)]
    assert torch.equal(*means)
