"""The metrics against torchmetrics, and the protocol of the one evaluator."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from latentcodec.finite import NotFinite
from latentcodec.pixels import from_uint8
from latentcodec.quality.metrics import evaluate, lpips_metric, psnr, reconstruct, ssim


class Stub:
    """A codec whose latents are the pixels, and whose decoder does what it is told."""

    def __init__(self, decoder=lambda y: y):
        self.decoder, self.sizes = decoder, []

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        self.sizes.append(size)
        return self.decoder(z)


def pictures(*shape: int) -> Tensor:
    """Pictures on the 8-bit grid."""
    return from_uint8(torch.randint(0, 256, shape, dtype=torch.uint8))


def distorted(x: Tensor, amount: float) -> Tensor:
    return (x + amount * torch.randn_like(x)).clamp(-1, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_of_each_image_equals_torchmetrics(channels):
    x = pictures(3, channels, 20, 31)
    y = torch.stack([distorted(image, amount) for image, amount in zip(x, (0.01, 0.1, 0.5), strict=True)])
    expected = [peak_signal_noise_ratio(b[None], a[None], data_range=2.0) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(psnr(x, y), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3, 40, 57), (2, 1, 11, 11), (1, 4, 64, 12)])
def test_ssim_of_each_image_equals_torchmetrics_inside_the_border(shape):
    x = torch.nn.functional.avg_pool2d(pictures(shape[0], shape[1], 2 * shape[2], 2 * shape[3]), 2)
    y = distorted(x, 0.2)
    settings = {"data_range": 1.0, "sigma": 1.5, "kernel_size": 11, "reduction": None}
    as_positive = ((y + 1) / 2, (x + 1) / 2)
    _, every_window = structural_similarity_index_measure(*as_positive, **settings, return_full_image=True)
    expected = every_window[..., 5:-5, 5:-5].flatten(1).mean(1)
    torch.testing.assert_close(ssim(x, y), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("a", "b"), [(0, 4), (128, 132), (251, 255), (0, 255)])
def test_ssim_of_flat_fields_is_that_of_their_levels_from_0_to_255(a, b):
    """Wang's luminance term, (2 a b + C1) / (a^2 + b^2 + C1), which pixels around zero would turn upside down."""
    x, y = (from_uint8(torch.full((1, 3, 16, 16), level, dtype=torch.uint8)) for level in (a, b))
    expected = (2 * a * b + 2.55**2) / (a * a + b * b + 2.55**2)
    assert ssim(x, y).item() == pytest.approx(expected, abs=1e-6)


def test_equal_images_have_infinite_psnr_and_ssim_one():
    x = pictures(2, 3, 16, 16)
    assert psnr(x, x).tolist() == [math.inf, math.inf]
    torch.testing.assert_close(ssim(x, x), torch.ones(2))


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match=r"11 pixels.*\[10, 40\]"):
        ssim(torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40))


def test_an_error_below_half_an_8_bit_level_does_not_count():
    image = pictures(3, 16, 16)
    assert evaluate(Stub(lambda y: y + 0.49 / 127.5), [image]).mean("psnr") == math.inf
    assert evaluate(Stub(lambda y: y + 0.51 / 127.5), [image]).mean("psnr") < 50


def test_what_the_decoder_overshoots_is_clamped():
    white = torch.ones(3, 16, 16)
    assert evaluate(Stub(lambda y: y + 0.7), [white]).mean("psnr") == math.inf


def test_images_finer_than_8_bits_are_scored_on_the_8_bit_grid_but_encoded_as_they_are():
    seen = []

    def decoder(y: Tensor) -> Tensor:
        seen.append(y)
        return y

    image = torch.rand(3, 16, 16) * 2 - 1
    assert evaluate(Stub(decoder), [image]).mean("psnr") == math.inf
    assert torch.equal(seen[0][0], image)


def test_the_mean_is_over_decibels_of_images_of_any_size():
    images = [-torch.ones(3, 16, 24), -torch.ones(3, 40, 12)]
    errors = iter((2 / 255, 20 / 255))
    codec = Stub(lambda y: y + next(errors))
    evaluation = evaluate(codec, images)
    assert codec.sizes == [(16, 24), (40, 12)]
    assert evaluation.values("psnr") == pytest.approx([48.13, 28.13], abs=0.01)
    assert evaluation.mean("psnr") == pytest.approx(38.13, abs=0.01)


def test_lpips_sees_the_same_8_bit_images_and_is_nan_where_not_asked_for():
    pairs = []

    def lpips(x: Tensor, y: Tensor) -> Tensor:
        pairs.append((x, y))
        return torch.tensor([0.25])

    image, codec = torch.rand(3, 16, 16) * 3 - 1.5, Stub(lambda y: y * 0.9)
    assert evaluate(codec, [image], lpips).values("lpips") == [0.25]
    x, y = pairs[0]
    for pixels in (x, y):
        torch.testing.assert_close((pixels + 1) * 127.5, ((pixels + 1) * 127.5).round(), rtol=0, atol=1e-4)
    assert torch.equal(y, reconstruct(codec, image[None]))
    assert psnr(x, y).tolist() == evaluate(codec, [image]).values("psnr")
    assert math.isnan(evaluate(codec, [image]).mean("lpips"))


def test_the_codec_runs_without_keeping_anything_for_gradients():
    weight = torch.ones((), requires_grad=True)

    def decoder(y: Tensor) -> Tensor:
        y = y * weight
        assert not y.requires_grad
        return y

    evaluate(Stub(decoder), [torch.zeros(3, 16, 16)])
    reconstruct(Stub(decoder), torch.zeros(1, 3, 16, 16))


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        evaluate(Stub(), [])


def test_lpips_names_the_weights_it_cannot_read(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.safetensors"):
        lpips_metric("vgg", tmp_path / "missing.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reconstruction_that_is_not_finite_has_no_score_and_its_image_is_named(value):
    def spoilt(y):
        y = y.clone()
        y[..., 3, 5] = value
        return y

    with pytest.raises(NotFinite, match=r"^second\.png: .*40 x 24 pixels.*reconstruction"):
        evaluate(
            Stub(lambda y: spoilt(y) if y.shape[-1] == 24 else y),
            [pictures(3, 24, 40), pictures(3, 40, 24)],
            names=["first.png", "second.png"],
        )
