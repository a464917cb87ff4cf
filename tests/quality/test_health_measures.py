"""The measures behind the verdicts, of latents and of the decoder, against numbers that can be worked out."""

import math

import pytest
import torch
from planted_codecs import IMAGES, Planted

from latentcodec.quality import decoder_measures as decoding
from latentcodec.quality import latent_measures as latents
from latentcodec.quality.health import cut_windows


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
