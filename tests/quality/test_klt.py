"""The linear transform every codec is measured against: optimal, orthonormal, whitening, and reproducible."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from latentcodec.pixels import find_images, load_image
from latentcodec.quality.klt import BLOCKS_PER_IMAGE, KLT
from latentcodec.quality.metrics import evaluate

F, C = 4, 5  # block side and coefficients of most tests


def smooth_images(count: int, height: int = 32, width: int = 24) -> list[Tensor]:
    """Random fields whose neighbours are alike, [3, H, W] in [-1, 1]."""
    noise = torch.randn(count, 3, height + 8, width + 8)
    smooth = torch.nn.functional.avg_pool2d(noise, 9, stride=1)
    return list(smooth / smooth.abs().max())


def blocks(images: list[Tensor]) -> np.ndarray:
    """[N, 3 f f] float64, cut by slicing: whole blocks only."""
    cut = [
        image[:, i : i + F, j : j + F].reshape(-1)
        for image in images
        for i in range(0, image.shape[1], F)
        for j in range(0, image.shape[2], F)
    ]
    return torch.stack(cut).double().numpy()


def squared_error(klt: KLT, images: list[Tensor]) -> float:
    """Of all pixels of all images, nothing rounded."""
    return sum(
        (klt.decode(klt.encode(image[None]), image.shape[-2:])[0] - image).double().square().sum().item()
        for image in images
    )


def test_the_error_is_that_of_the_singular_value_decomposition():
    images = smooth_images(6)
    stacked = blocks(images)
    singular_values = np.linalg.svd(stacked - stacked.mean(0), compute_uv=False)
    expected = (singular_values[C:] ** 2).sum()
    assert squared_error(KLT.fit(images, F, C), images) == pytest.approx(expected, rel=1e-5)


def test_the_variances_are_the_largest_eigenvalues_of_the_blocks_covariance():
    images = smooth_images(6)
    expected = np.linalg.eigvalsh(np.cov(blocks(images).T, bias=True))[::-1][:C]
    np.testing.assert_allclose(KLT.fit(images, F, C).variance.numpy(), expected, rtol=1e-5)


def test_no_random_projection_has_a_smaller_error():
    images = smooth_images(6)
    klt = KLT.fit(images, F, C)
    best = squared_error(klt, images)
    for _ in range(20):
        basis = torch.linalg.qr(torch.randn(3 * F * F, C))[0].T.reshape(C, 3, F, F)
        assert best < squared_error(KLT(basis, klt.mean, klt.variance), images)
    nearly = torch.linalg.qr((klt.basis.flatten(1) + 0.02 * torch.randn(C, 3 * F * F)).T)[0].T
    assert best < squared_error(KLT(nearly.reshape(C, 3, F, F), klt.mean, klt.variance), images)


def test_the_basis_is_orthonormal_and_its_signs_are_fixed():
    basis = KLT.fit(smooth_images(6), F, C).basis.flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(C), rtol=0, atol=1e-5)
    assert (basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all()


def test_latents_have_zero_mean_and_unit_variance_over_the_images_of_the_fit():
    images = smooth_images(6)
    klt = KLT.fit(images, F, C)
    z = klt.encode(torch.stack(images)).transpose(0, 1).flatten(1)  # [c, N]
    torch.testing.assert_close(z.mean(1), torch.zeros(C), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(C), rtol=1e-3, atol=0)


def test_shapes_are_those_of_a_codec_for_any_size():
    images = smooth_images(3, 22, 37)
    klt = KLT.fit(images, F, C)
    assert (klt.downsampling_factor, klt.latent_channels, klt.image_channels) == (F, C, 3)
    z = klt.encode(torch.stack(images))
    assert z.shape == (3, C, 6, 10)
    assert klt.decode(z).shape == (3, 3, 24, 40)
    assert klt.decode(z, size=(22, 37)).shape == (3, 3, 22, 37)


def test_all_coefficients_give_the_image_back():
    images = smooth_images(40, 22, 37)
    klt = KLT.fit(images, F, 3 * F * F)
    x = torch.stack(images[:4])
    torch.testing.assert_close(klt.decode(klt.encode(x), size=(22, 37)), x, rtol=0, atol=1e-4)


def test_an_image_that_uses_few_directions_codes_to_finite_latents():
    grey = [image[:1].expand(3, -1, -1) for image in smooth_images(6)]
    klt = KLT.fit(grey, F, 3 * F * F)  # a third of the directions has no variance
    z = klt.encode(grey[0][None])
    assert z.abs().max() < 100
    torch.testing.assert_close(klt.decode(z)[0], grey[0], rtol=0, atol=1e-4)


def test_a_large_image_counts_with_a_fixed_choice_of_its_blocks():
    large = smooth_images(1, 160, 160)  # 1600 blocks
    assert (160 // F) ** 2 > BLOCKS_PER_IMAGE
    first = KLT.fit(large, F, C)
    torch.manual_seed(1)
    assert torch.equal(first.basis, KLT.fit(large, F, C).basis)
    few = smooth_images(1)
    both = KLT.fit([*few, *large], F, C)
    share = blocks(few).shape[0] / (blocks(few).shape[0] + BLOCKS_PER_IMAGE)
    expected = share * KLT.fit(few, F, C).mean + (1 - share) * first.mean
    torch.testing.assert_close(both.mean, expected, rtol=1e-4, atol=1e-6)


def test_a_fit_that_cannot_be_says_why():
    with pytest.raises(ValueError, match="none was given"):
        KLT.fit([], F, C)
    with pytest.raises(ValueError, match="48 numbers; a KLT cannot keep 49"):
        KLT.fit(smooth_images(2), F, 49)
    with pytest.raises(ValueError, match="4 blocks cannot fix 5"):
        KLT.fit(smooth_images(1, 8, 8), F, C)


def test_on_photographs_more_coefficients_give_decibels_of_the_known_order(photos):
    fit_on = [load_image(path)[0] for path in find_images(photos / "train")[::160]]
    score_on = [load_image(path)[0][:, 128:384, 128:384] for path in find_images(photos / "val")[::4]]
    decibels = [evaluate(KLT.fit(fit_on, 8, c), score_on).mean("psnr") for c in (4, 16)]
    assert decibels == sorted(decibels)
    assert all(math.isfinite(value) for value in decibels)
    assert 21 < decibels[0] < 30  # Kodak: 23.3
    assert 27 < decibels[1] < 36  # Kodak: 28.8
