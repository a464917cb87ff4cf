"""The verdicts on planted codecs, whose faults are known, and the measures against numbers that can be worked out."""

import math

import pytest
import torch
from diffusers import AutoencoderKL

from latentcodec.codec import LatentCodec
from latentcodec.quality import decoder_measures as decoding
from latentcodec.quality import latent_measures as latents
from latentcodec.quality.health import cut_windows, measure_health, passes, posterior_health
from latentcodec.quality.klt import KLT
from latentcodec.quality.verdicts import TABLE, verdicts


def smooth_images(count=100, side=64):
    """[N, 3, S, S] in [-1, 1]: noise whose amplitude falls with the frequency, as that of photographs does."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]).clamp(
        min=1 / side
    )
    noise = torch.fft.rfft2(torch.randn(count, 3, side, side, generator=generator)) / frequency**1.5
    images = torch.fft.irfft2(noise)
    return (0.35 * images / images.std((2, 3), keepdim=True)).clamp(-1, 1)


class Planted:
    """The KLT of 8 x 8 blocks as a codec, with a posterior whose noise, scale and dead channels are chosen."""

    downsampling_factor = 8

    def __init__(self, images, c=8, noise=0.1, white=True, dead=(), constant=(), ignored=(), collapsed=False):
        self.klt = KLT.fit(images, 8, c)
        self.latent_channels, self.noise, self.collapsed = c, noise, collapsed
        deviations = self.klt.std / self.klt.variance.mean().sqrt()
        self.scale = torch.ones(c, 1, 1) if white else deviations[:, None, None]
        self.dead, self.constant, self.ignored = [*dead], [*constant], [*ignored]
        fitted = self.klt.encode(torch.stack([*images]))
        self.fitted_mean, self.fitted_std = fitted.mean((0, 2, 3)), fitted.std((0, 2, 3))

    def posterior(self, x):
        mean = self.klt.encode(x) * self.scale
        std = self.noise * torch.ones_like(mean) * self.scale
        generator = torch.Generator().manual_seed(len(x))
        for k in self.dead:
            mean[:, k], std[:, k] = 0.01 * torch.randn(mean[:, k].shape, generator=generator), 1.0
        for k in self.constant:
            mean[:, k], std[:, k] = 0.3, 1e-4
        for k in self.ignored:
            mean[:, k] = torch.randn(mean[:, k].shape, generator=generator)
        if self.collapsed:
            mean, std = 1e-3 * mean, torch.ones_like(std)
        return mean, std

    def decode(self, z, size=None):
        z = z / self.scale
        z = 1e-3 * z if self.collapsed else z
        for k in (*self.dead, *self.constant, *self.ignored):
            z[:, k] = self.fitted_mean[k]
        return self.klt.decode(z, size)


IMAGES = smooth_images()


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
    few = measure_health(Planted(IMAGES, c=1, noise=0.05), IMAGES[:12])[0]
    for headline in ("diffusion", "sampling", "storage"):
        assert "provisional" in rules(few, headline, "notes")
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


# --- the measures


def test_white_latents_have_the_numbers_of_white_latents():
    z = torch.randn(60, 4, 32, 32)
    sec, channels = latents.high_frequency_share(z)
    assert sec == pytest.approx(0.87, abs=0.02)
    assert channels == pytest.approx([sec] * 4, abs=0.02)
    assert latents.viv(z) == pytest.approx(math.pi / 2, abs=0.02)
    assert latents.local_similarity(z, 8) == pytest.approx(0, abs=0.01)
    assert latents.effective_rank(z) == pytest.approx(4, abs=0.01)
    spectrum = latents.radial_spectrum(z)
    assert all(power == pytest.approx(1, abs=0.1) for _, power in spectrum[2:])


def test_viv_finds_correlated_cells_and_needs_enough_windows():
    common = torch.randn(200, 4, 1, 1).expand(-1, -1, 8, 8)
    assert latents.viv(common + 0.1 * torch.randn(200, 4, 8, 8)) < 0.6
    assert latents.viv(torch.randn(10, 4, 8, 8)) is None


def test_the_spectrum_of_a_cosine_is_in_its_own_frequency():
    place = (torch.arange(32) + 0.5) * math.pi / 32
    low, high = torch.cos(2 * place), torch.cos(20 * place)
    assert latents.high_frequency_share(low.expand(1, 1, 32, 32))[0] == pytest.approx(0, abs=1e-6)
    assert latents.high_frequency_share(high.expand(1, 1, 32, 32))[0] == pytest.approx(1, abs=1e-6)


def test_rate_and_kl_of_a_gaussian_posterior():
    """Signal of variance 0.75 and noise of 0.25: one bit; the KL is that of torch.distributions."""
    mean, std = math.sqrt(0.75) * torch.randn(64, 2, 16, 16), torch.full((64, 2, 16, 16), 0.5)
    moments = latents.channel_moments(mean, std)
    assert moments.rate.tolist() == pytest.approx([1.0, 1.0], abs=0.02)
    assert moments.signal_share.tolist() == pytest.approx([0.75, 0.75], abs=0.01)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).mean((0, 2, 3))
    assert moments.kl.tolist() == pytest.approx(kl.tolist(), rel=1e-5)


def test_tails_of_normal_draws():
    found = latents.tails(torch.randn(64, 1, 64, 64))
    assert found["within_1"][0] == pytest.approx(0.683, abs=0.005)
    assert found["within_3"][0] == pytest.approx(0.9973, abs=0.001)
    assert found["kurtosis"][0] == pytest.approx(3, abs=0.05)


def test_labels_and_masks():
    labels = [0, 1] * 20
    z = torch.randn(40, 8, 4, 4) + 5 * torch.eye(8)[labels][:, :, None, None]
    assert latents.label_agreement(z, labels) == 1
    mask = torch.zeros(40, 4, 4)
    mask[:, :2] = 1
    alike = torch.randn(40, 8, 4, 4) + 9 * mask[:, None] * torch.randn(40, 8, 1, 1)
    assert latents.foreground_similarity(alike, mask) > 0.8
    assert abs(latents.foreground_similarity(torch.randn(40, 8, 4, 4), mask)) < 0.1


def test_the_noise_of_one_decibel_is_interpolated():
    curve = [(0.0, 30.0), (0.02, 29.9), (0.05, 29.5), (0.1, 28.0), (0.2, 25.0)]
    assert 0.05 < decoding.noise_of_one_decibel(curve) < 0.1
    assert decoding.noise_of_one_decibel([(0.0, 30.0), (0.02, 26.0)]) == pytest.approx(0.01)
    assert decoding.noise_of_one_decibel([(0.0, 30.0), (0.02, 30.0)]) == 1.0


def test_a_codec_that_moves_with_its_image_has_no_equivariance_error():
    class Mean(Planted):
        latent_channels = 1

        def posterior(self, x):
            z = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 8)
            return z, torch.full_like(z, 0.1)

    errors = decoding.equivariance_errors(Mean(IMAGES), IMAGES[:4])
    assert errors.keys() == {"half", "quarter_turn", "mirror"}
    assert max(errors.values()) < 1e-9


def test_windows_are_cut_from_the_middle_and_small_images_left_out():
    images = [torch.zeros(3, 40, 70), torch.ones(3, 45, 41), torch.zeros(3, 12, 90)]
    x, kept = cut_windows(images, 8)
    assert x.shape == (2, 3, 40, 40)
    assert kept == [0, 1]
    with pytest.raises(ValueError, match="smaller than one latent cell"):
        cut_windows([torch.zeros(3, 4, 4)], 8)


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
