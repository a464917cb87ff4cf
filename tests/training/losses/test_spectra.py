"""The regularizers on spectra: what they reward, and scipy's transform as reference."""

import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor

from latentcodec.training.losses import spectra


def power_law(exponent: float, channels: int, side: int) -> Tensor:
    """Images whose cosine spectrum falls as a power of the frequency, of unit variance."""
    index = torch.arange(side)
    radius = torch.hypot(index[:, None].float(), index.float()).clamp(min=1)
    coefficients = torch.randn(16, channels, side, side) * radius ** (-exponent / 2)
    x = torch.from_numpy(idctn(coefficients.numpy(), axes=(2, 3), norm="ortho"))
    return x / x.std()


def test_the_spectrum_loss_is_zero_for_the_image_itself_and_grows_with_the_mismatch() -> None:
    x = power_law(2.0, 3, 32)
    assert spectra.spectrum_loss(x, x, flattening=0.0).max() < 1e-5
    matched, flat = power_law(1.0, 4, 32), torch.randn(16, 4, 32, 32)
    like_image = power_law(2.0, 4, 32)
    flattened = [spectra.spectrum_loss(z, x, 1.0).mean() for z in (like_image, matched, flat)]
    plain = [spectra.spectrum_loss(z, x, 0.0).mean() for z in (like_image, matched, flat)]
    assert plain[0] < plain[1] < plain[2]
    assert flattened[1] < min(flattened[0], flattened[2])


def test_the_spectrum_loss_ignores_the_mean_and_teaches_the_latent_only() -> None:
    x, z = power_law(2.0, 3, 64).requires_grad_(), torch.randn(16, 4, 16, 16, requires_grad=True)
    loss = spectra.spectrum_loss(z, x, 1.0)
    torch.testing.assert_close(spectra.spectrum_loss(z + 5, x + 3, 1.0), loss, rtol=1e-3, atol=1e-5)
    loss.mean().backward()
    assert x.grad is None
    assert z.grad.abs().sum() > 0
    lower = spectra.spectrum_loss(z.detach() - 20 * z.grad, x, 1.0)
    assert lower.mean() < loss.mean()


def test_a_small_or_oblong_latent_has_a_finite_spectrum_loss() -> None:
    for side in ((2, 2), (3, 8)):
        z, x = torch.randn(2, 4, *side, requires_grad=True), torch.randn(2, 3, side[0] * 8, side[1] * 8)
        loss = spectra.spectrum_loss(z, x, 1.0)
        loss.mean().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(z.grad).all()


def test_the_mask_removes_the_same_diagonals_of_every_block_and_nothing_else() -> None:
    t = torch.randn(2, 3, 16, 24)
    assert {spectra.draw_masked_diagonals(0, step) for step in range(60)} == {0, 8, 10, 12}
    torch.testing.assert_close(spectra.mask_spectrum(t, 0), t, atol=1e-5, rtol=1e-5)
    for diagonals in (8, 10, 12):
        masked = spectra.mask_spectrum(t, diagonals)
        before, after = (dctn(b[0, 1, 8:16, 16:24].numpy(), norm="ortho") for b in (t, masked))
        for u in range(8):
            for v in range(8):
                expected = 0.0 if u + v >= 15 - diagonals else before[u, v]
                assert after[u, v] == pytest.approx(expected, abs=1e-5)
        torch.testing.assert_close(spectra.mask_spectrum(masked, diagonals), masked, atol=1e-5, rtol=1e-5)


def test_a_latent_that_does_not_divide_into_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"spectrum_masking.*12 x 16.*data.resolution"):
        spectra.mask_spectrum(torch.randn(1, 4, 12, 16), 8)
