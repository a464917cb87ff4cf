"""The finish of a run: normalised or whitened latents, the half-precision certificate, the folder replaced whole."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from small_runs import new_trainer, small, start, train, write_images
from torch.nn import functional as F

from latentcodec.adopt import build
from latentcodec.codec import LatentCodec
from latentcodec.latents import LatentStatistics, fold, latent_statistics, whitening
from latentcodec.quality.metrics import evaluate, reconstruct
from latentcodec.quality.precision import certify, extreme_images
from latentcodec.training.data.text import find_fonts
from latentcodec.training.export.codec_folder import FinishConfig, finish, recover_codec, write_codec
from latentcodec.training.start.adapt import AdaptConfig
from latentcodec.training.start.linear import linear_start
from latentcodec.training.start.model import ModelConfig

F_, C_ = 4, 6


def pictures(count, side=32, seed=0, channels=3):
    """Smooth drawn noise with colours that go together, as photographs have."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, side // 8, side // 8, generator=generator)
    fine = torch.randn(count, 1, side, side, generator=generator)
    x = F.interpolate(coarse, size=(side, side), mode="bicubic") + coarse.mean((1, 2, 3), keepdim=True)
    return (0.5 * x + 0.1 * fine).clamp(-1, 1)


def random_vae(quant=False, **settings):
    """Random weights, biases and norms, and a posterior whose spread differs from channel to channel."""
    settings = {"latent_channels": C_, "block_out_channels": [8, 16, 16], "layers_per_block": 1, **settings}
    stages = len(settings["block_out_channels"])
    vae = build(
        {
            "down_block_types": ["DownEncoderBlock2D"] * stages,
            "up_block_types": ["UpDecoderBlock2D"] * stages,
            "norm_num_groups": settings.pop("norm_num_groups", 4),
            "use_quant_conv": quant,
            "use_post_quant_conv": quant,
            **settings,
        }
    ).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        c = vae.config.latent_channels
        vae.encoder.conv_out.bias[c:] = torch.linspace(-6, -1, c)
        vae.encoder.conv_out.bias[:c] = torch.linspace(-2, 3, c)
        vae.encoder.conv_out.weight *= 3
    return vae.requires_grad_(False)


def copy_of(vae):
    other = build({k: v for k, v in vae.config.items() if not k.startswith("_")}).eval()
    other.load_state_dict(vae.state_dict())
    return other.requires_grad_(False)


def raw(vae, x):
    return vae.encode(x).latent_dist.mode()


def cells(z):
    return z.transpose(0, 1).flatten(1).double()


# ---- the statistics ----


def test_streamed_moments_are_those_of_all_cells_at_once():
    vae, x = random_vae(), pictures(10)
    statistics = latent_statistics(vae, x.split(3))
    z = cells(raw(vae, x))
    assert torch.allclose(statistics.mean, z.mean(1), atol=1e-6)
    assert torch.allclose(statistics.covariance, torch.cov(z, correction=0), atol=1e-6)
    assert torch.allclose(statistics.std, z.std(1, correction=0), atol=1e-6)
    assert torch.allclose(
        statistics.logvar, cells(vae.encode(x).latent_dist.logvar).mean(1), rtol=1e-6, atol=1e-6
    )


def test_pixel_covariances_belong_to_the_block_over_the_cell():
    vae, x = random_vae(), pictures(4)
    z = cells(raw(vae, x))
    block = cells(x.unfold(2, F_, F_).unfold(3, F_, F_)[:, 1, :, :, 2, 3][:, None])[
        0
    ]  # one pixel of each, green
    expected = (block - block.mean()) @ (z - z.mean(1, keepdim=True)).T / z.shape[1]
    assert torch.allclose(latent_statistics(vae, [x]).pixels[1 * F_ * F_ + 2 * F_ + 3], expected, atol=1e-6)


def test_moments_of_two_processes_are_those_of_one():
    vae, x = random_vae(), pictures(8)
    shares = []
    for part in (x[::2], x[1::2]):  # what each of two processes would contribute to the sum of all
        latent_statistics(vae, part.split(2), lambda sums: shares.append(sums) or sums)
    two = latent_statistics(vae, x[::2].split(2), lambda sums: sum(shares))
    one = latent_statistics(vae, x.split(4))
    for name in ("mean", "covariance", "logvar", "pixels"):
        assert torch.allclose(getattr(one, name), getattr(two, name), rtol=1e-9, atol=1e-9), name


# ---- one scale, and each channel by itself ----


@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("normalise", ["per_channel", "one_scale"])
def test_folded_latents_have_unit_variance_for_the_codec_and_in_pipelines(tmp_path, normalise, quant):
    vae, x = random_vae(quant), pictures(16)
    before = raw(vae, x)
    y, std = vae.decode(before).sample, vae.encode(x).latent_dist.std
    finish(vae, normalise, latent_statistics(vae, [x]), [])
    write_codec(LatentCodec(vae), tmp_path / "codec", "card")
    codec = LatentCodec.from_pretrained(tmp_path / "codec")
    stock = AutoencoderKL.from_pretrained(tmp_path / "codec").eval()
    numbers = [stock.config[key] for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")]
    assert numbers == [1, 0, None, None]
    z = raw(stock, x)
    assert (codec.encode(x) - z).abs().max() < 1e-4
    if normalise == "per_channel":
        assert cells(z).mean(1).abs().max() < 1e-4
        assert (cells(z).std(1, correction=0) - 1).abs().max() < 1e-4
    else:  # directions and relative spreads stay
        assert z.mean().abs() < 1e-4
        assert abs(z.std(correction=0).item() - 1) < 1e-4
        assert torch.allclose(z.std() * (before - before.mean()) / before.std(), z, atol=1e-3)
    scale = cells(before).std(1) / cells(z).std(1)  # the posterior's spread is scaled exactly
    assert torch.allclose(codec.posterior(x)[1] * scale[:, None, None].float(), std, rtol=1e-3)
    assert (stock.decode(z).sample - y).abs().max() < 1e-4 * (y.max() - y.min())


# ---- the whitening ----


@pytest.mark.parametrize("quant", [False, True])
def test_whitening_leaves_every_reconstruction_as_it_was(quant):
    vae = random_vae(quant)
    white = copy_of(vae)
    fold(white, whitening(latent_statistics(vae, [pictures(16)])))
    for size in ((32, 32), (37, 50), (5, 3)):  # odd sizes, and images that are all border
        x = pictures(2, 64, seed=1)[:, :, : size[0], : size[1]]
        ours, theirs = LatentCodec(white), LatentCodec(vae)
        y = theirs.decode(theirs.encode(x), size)
        assert (ours.decode(ours.encode(x), size) - y).abs().max() < 1e-4 * (y.max() - y.min())


@pytest.mark.parametrize("quant", [False, True])
def test_whitened_latents_are_white_in_stock_pipelines(tmp_path, quant):
    vae, x = random_vae(quant), pictures(16)
    finish(vae, "whitened", latent_statistics(vae, [x]), [])
    write_codec(LatentCodec(vae), tmp_path / "codec", "card")
    stock = AutoencoderKL.from_pretrained(tmp_path / "codec").eval()
    assert stock.config.latents_mean is None  # of which SDXL's pipelines read exactly four
    assert stock.config.latents_std is None
    z = cells((raw(stock, x) - stock.config.shift_factor) * stock.config.scaling_factor)
    assert z.mean(1).abs().max() < 1e-4
    assert (torch.cov(z, correction=0) - torch.eye(C_)).abs().max() < 1e-3


def test_whitened_channels_are_ordered_by_the_pixels_they_explain():
    vae, x = random_vae(), pictures(16)
    fold(vae, whitening(latent_statistics(vae, [x])))
    patterns = latent_statistics(vae, [x]).pixels  # [C f f, c]: pixels per unit of each channel
    energy = patterns.square().sum(0)
    assert (energy.diff() <= 1e-4 * energy[0]).all()
    together = patterns.T @ patterns
    assert (together - torch.diag(energy)).abs().max() < 1e-3 * energy[0]
    largest = patterns.gather(0, patterns.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_whitening_finds_the_principal_components_in_any_mixture_of_them():
    vae, x = random_vae(block_out_channels=[16, 16, 16], norm_num_groups=2), pictures(64)
    linear_start(vae, list(x))  # the KLT: unit variance, by falling energy
    mixed = copy_of(vae)
    turn = torch.linalg.qr(torch.randn(C_, C_)).Q
    mixed.encoder.conv_out.weight[:C_] = torch.einsum("ab,bkij->akij", turn, vae.encoder.conv_out.weight[:C_])
    fold(mixed, whitening(latent_statistics(mixed, [x])))
    found, expected = cells(raw(mixed, x)), cells(raw(vae, x))
    assert (found * expected).mean(1)[
        :3
    ].min() > 0.9  # correlations, with their signs, while energies are far apart


def test_log_variances_of_a_mere_rescaling_are_exact():
    vae, x = random_vae(), pictures(8)
    statistics = latent_statistics(vae, [x])
    apart = LatentStatistics(
        statistics.mean, torch.diag(statistics.std**2), statistics.logvar, torch.eye(C_).double()
    )
    before = vae.encode(x).latent_dist
    fold(vae, whitening(apart))
    after = vae.encode(x).latent_dist.logvar.mean((0, 2, 3))
    expected = (before.logvar - 2 * statistics.std.log()[:, None, None].float()).mean(
        (0, 2, 3)
    )  # in another order
    assert torch.allclose(after.sort().values, expected.sort().values, atol=1e-4)


def test_log_variances_of_a_rotation_are_closer_to_the_marginal_ones_than_any_constant():
    vae, x = random_vae(), pictures(8)
    variance = cells(vae.encode(x).latent_dist.var)
    change = whitening(latent_statistics(vae, [x]))
    fold(vae, change)
    found = cells(vae.encode(x).latent_dist.logvar)
    marginal = (change.matrix.square() @ variance).log()
    assert (found <= marginal + 1e-4).all()  # it is a tangent of a convex function
    assert ((found - marginal).square().mean(1) < marginal.var(1)).all()
    assert (found - marginal).square().mean() < 0.5 * marginal.var(1).mean()


def test_a_dead_channel_is_not_blown_up():
    vae, x = random_vae(), pictures(8)
    vae.encoder.conv_out.weight[2] = 0
    parent = copy_of(vae)
    fold(vae, whitening(latent_statistics(vae, [x])))
    assert raw(vae, x).abs().max() < 100
    assert vae.quant_conv.weight.abs().max() < 1e4
    y = parent.decode(raw(parent, x)).sample
    assert (vae.decode(raw(vae, x)).sample - y).abs().max() < 1e-4 * (y.max() - y.min())


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


# ---- the folder ----


def test_an_interrupted_write_leaves_the_codec_that_was_there(tmp_path, monkeypatch):
    folder, first, second = tmp_path / "codec", LatentCodec(random_vae()), LatentCodec(random_vae())
    write_codec(first, folder, "first")

    def full_disk(self, target, card):
        target.mkdir()
        (target / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LatentCodec, "save_pretrained", full_disk)
        with pytest.raises(OSError, match=r"cannot write the codec to .*codec.*No space left.*untouched"):
            write_codec(second, folder, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]
    assert (folder / "README.md").read_text() == "first"
    write_codec(second, folder, "second")
    assert (folder / "README.md").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]


def killed_before_rename_to(target, work):
    """`work` in a forked child that kills itself just before it gives something the name `target`."""
    child = os.fork()
    if child == 0:

        def before(event, arguments):
            if event == "os.rename" and Path(arguments[1]) == target:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(before)
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("name", [".codec.old", "codec"])
def test_a_kill_before_either_rename_loses_nothing(tmp_path, name):
    folder, codec = tmp_path / "codec", LatentCodec(random_vae())
    write_codec(codec, folder, "first")
    killed_before_rename_to(tmp_path / name, lambda: write_codec(codec, folder, "second"))
    assert folder.exists() == (name == ".codec.old")
    recover_codec(folder)
    assert (folder / "README.md").read_text() == "first"
    assert json.loads((folder / "config.json").read_text())["latent_channels"] == C_
    write_codec(codec, folder, "third")
    assert (folder / "README.md").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]


def test_a_run_that_was_killed_while_it_replaced_its_codec_has_it_back_as_soon_as_it_starts(tmp_path):
    config = small(tmp_path / "run", write_images(tmp_path / "images"))
    trainer = start(config)
    train(trainer, kill_at=3)  # codec/ is that of step 2
    weights = tmp_path / "run/codec/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    with torch.no_grad():
        next(trainer.state.ema.parameters()).zero_()
    killed_before_rename_to(tmp_path / "run/codec", trainer.exporter.save_codec)
    assert not weights.exists()
    new_trainer(config)
    assert weights.read_bytes() == before


def test_a_fine_tuned_codec_does_not_say_where_its_parent_lies(tmp_path):
    write_codec(LatentCodec(random_vae()), tmp_path / "parent", "card")
    parent = LatentCodec.from_pretrained(tmp_path / "parent")
    assert str(tmp_path) in parent.vae.config["_name_or_path"]
    write_codec(parent, tmp_path / "child", "card")
    assert (tmp_path / "child/config.json").read_bytes() == (tmp_path / "parent/config.json").read_bytes()
