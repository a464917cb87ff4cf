"""The verdicts on planted codecs, whose faults are known."""

import math

import pytest
import torch
from diffusers import AutoencoderKL
from planted_codecs import IMAGES, Planted, smooth_images

from latentcodec.codec import LatentCodec
from latentcodec.quality.health import measure_health, passes, posterior_health
from latentcodec.quality.verdicts import TABLE, verdicts


def health_of(**settings):
    return measure_health(Planted(IMAGES, **settings), IMAGES)[0]


def rules(health, headline, kind="reasons"):
    return {entry["rule"] for entry in health.verdicts[headline][kind]}


def levels(health):
    return [health.verdicts[headline]["level"] for headline in ("diffusion", "sampling", "storage")]


def test_a_good_codec_is_healthy():
    """Smooth latents of few channels with a noise that the decoder bears."""
    health = health_of(c=1, noise=0.05)
    assert health.measures["sec"] < 0.45
    assert levels(health)[0] == "healthy", health.verdicts["diffusion"]["reasons"]
    assert levels(health)[1:] == ["healthy", "healthy"]


def test_without_a_kl_it_is_an_autoencoder_which_only_sampling_minds():
    health = health_of(c=1, noise=1e-5)
    assert health.measures["rate_bits"] == pytest.approx(-math.log2(1e-5), abs=0.05)
    assert levels(health) == ["healthy", "failure", "healthy"]
    assert rules(health, "sampling") == {"nearly_autoencoder"}
    assert rules(health, "diffusion", "notes") == {"nearly_autoencoder"}


def test_far_too_strong_a_kl_collapses_the_posterior():
    health = health_of(collapsed=True)
    assert levels(health) == ["failure"] * 3
    assert rules(health, "diffusion") == {"posterior_collapse"}
    assert health.measures["signal_share"] < 1e-4
    assert health.measures["decoder_spread"] < 1e-3


def test_a_decoder_that_ignores_its_latents_is_a_collapse_too():
    measures = {"decoder_spread": 0.01, "images": 200, "cells": 10**6}
    channels = [{"name": "0", "signal_share": 0.9, "std": 1.0, "mean": 0.0, "mean_error": 0.0, "noise": 0.1}]
    assert verdicts(measures, channels)["diffusion"]["reasons"][0]["measure"] == "decoder_spread"


@pytest.mark.parametrize("why", ["dead", "constant", "ignored"])
def test_three_dead_channels_of_sixteen_are_named_with_the_reason(why):
    health = health_of(c=16, **{why: (3, 7, 12)})
    found = {c["name"]: c["dead"] for c in health.channels if c["dead"] is not None}
    assert found == dict.fromkeys(("3", "7", "12"), "noise" if why == "dead" else why)
    reason = next(r for r in health.verdicts["diffusion"]["reasons"] if r["rule"] == "dead_channels")
    assert reason["level"] == "warning"
    assert "12" in reason["text"]
    assert "dead_channels" in rules(health, "sampling", "notes") & rules(health, "storage", "notes")


def test_dead_channels_above_a_quarter_fail():
    health = health_of(c=8, dead=(1, 4, 6))
    reason = next(r for r in health.verdicts["diffusion"]["reasons"] if r["rule"] == "dead_channels")
    assert reason["level"] == "failure"
    assert levels(health)[0] == "failure"


def test_noise_of_the_size_of_the_signal_is_too_noisy_for_diffusion_and_storage():
    health = health_of(c=8, noise=0.8)
    assert "too_noisy" in rules(health, "diffusion") & rules(health, "storage")
    assert "too_noisy" not in rules(health, "sampling")


def test_whitening_a_klt_makes_it_rough_and_its_own_variances_leave_it_unnormalised():
    white, plain = health_of(c=16), health_of(c=16, white=False)
    assert white.measures["sec"] > plain.measures["sec"]
    assert "rough_spectrum" in rules(white, "diffusion")
    assert "not_normalised" not in rules(white, "diffusion") | rules(white, "sampling")
    assert "rough_spectrum" not in rules(plain, "diffusion")
    assert "not_normalised" in rules(plain, "diffusion") & rules(plain, "sampling")
    assert plain.verdicts["sampling"]["level"] == "failure"


def test_few_pictures_make_every_verdict_provisional_and_change_no_level():
    few, all_of_them = (measure_health(Planted(IMAGES, c=1, noise=0.05), x)[0] for x in (IMAGES[:12], IMAGES))
    for headline in ("diffusion", "sampling", "storage"):
        assert "provisional" in rules(few, headline, "notes")
    assert levels(few) == levels(all_of_them)
    assert "provisional" not in rules(health_of(c=1), "diffusion", "notes")


def test_a_small_shift_on_few_pictures_is_no_alarm():
    """The mean of ten photographs is off zero by chance; three standard errors are asked for."""
    channel = {"name": "0", "signal_share": 1.0, "std": 1.0, "mean": 0.2, "noise": 0.1}
    measures = {"images": 100, "cells": 10**5}
    for error, found in ((0.1, False), (0.01, True)):
        result = verdicts(measures, [channel | {"mean_error": error}])["diffusion"]
        assert ("not_normalised" in {r["rule"] for r in result["reasons"]}) == found


def test_the_levels_are_those_of_the_table():
    """Every rule has its three meanings, and a headline is the worst of its reasons."""
    assert TABLE["nearly_autoencoder"] == ("note", "failure", "note")
    assert TABLE["holes"] == ("note", "failure", None)
    health = health_of(c=16, noise=1e-5, white=False)
    for entry in health.verdicts.values():
        worst = {reason["level"] for reason in entry["reasons"]}
        assert entry["level"] == ("failure" if "failure" in worst else "warning" if worst else "healthy")
        assert all(note["level"] == "note" for note in entry["notes"])


def test_codes_with_holes_fail_for_sampling():
    """Codes on a small ring leave the middle and the outside of N(0, I) empty."""
    angle = torch.linspace(0, 2 * math.pi, 401)[:400]
    ring = torch.stack([2 * angle.cos(), 2 * angle.sin()], 1)[:, :, None, None]
    health = posterior_health(ring, torch.full_like(ring, 0.01), 28)
    assert health.measures["hole_share"] > health.measures["hole_share_ideal"] + 0.3
    assert "holes" in rules(health, "sampling")
    assert "holes" in rules(health, "diffusion", "notes")
    normal = torch.randn(400, 2, 1, 1, generator=torch.Generator().manual_seed(5))
    assert "holes" not in rules(posterior_health(normal, torch.full_like(normal, 0.1), 28), "sampling")


def test_the_summary_is_what_inspect_prints_as_json():
    summary = health_of(c=1).summary()
    assert summary.keys() == {"verdicts", "measures", "channels"}
    assert summary["verdicts"].keys() == {"diffusion", "sampling", "storage"}
    assert summary["verdicts"]["storage"].keys() == {"level", "reasons", "notes"}


def test_every_cure_is_a_key_of_the_configuration():
    config = pytest.importorskip("latentcodec.training.config")
    known = {
        f"{room}.{key}"
        for room, part in vars(config.Config("runs/none")).items()
        if hasattr(part, "__dict__")
        for key in vars(part)
    }
    bad = {
        "rate_bits": 9.0,
        "draw_cost_db": 2.0,
        "noise_1db": 0.01,
        "sec": 0.9,
        "within_3": 0.9,
        "images": 1,
        "cells": 1,
    }
    bad |= {"hole_share": 0.9, "hole_share_ideal": 0.1, "int8_loss_db": 1.0}
    channel = {"name": "0", "signal_share": 1.0, "std": 9.0, "mean": 3.0, "mean_error": 0.1, "noise": 0.1}
    channels = [channel, channel | {"name": "1", "signal_share": 0.0}]
    found = verdicts(bad, channels)
    entries = [e for part in found.values() for kind in ("reasons", "notes") for e in part[kind]]
    assert {e["rule"] for e in entries} >= {"holes", "fragile", "too_noisy", "heavy_tails", "not_normalised"}
    for entry in entries:
        for word in entry["cure"].replace(",", " ").replace(":", " ").split():
            if ("." in word or "_" in word) and not word[0].isdigit():
                assert word in known, entry["cure"]


def test_a_real_autoencoder_goes_through_with_progress_and_certificate():
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=2,
        latent_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    codec, done = LatentCodec(vae), []
    x = smooth_images(6, 32)
    health, windows = measure_health(codec, x, labels=[0, 0, 0, 1, 1, 1], progress=done.append)
    assert sum(done) == passes(6, 3)
    assert health.measures["fp16_safe"] in (True, False)
    assert windows.y.shape == x.shape
    assert 0 <= health.measures["lnc"] <= 1
