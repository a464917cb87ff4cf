"""Crops and the order in which images come, as pure functions."""

import numpy as np
import pytest
import torch

from latentcodec.training.data.crops import random_crop
from latentcodec.training.data.order import BucketedOrder, bucket_sizes, nearest_bucket


def ramp(height: int, width: int) -> torch.Tensor:
    """An image whose value is its column, in thousandths."""
    return (torch.arange(width) / 1000).expand(1, height, width)


def test_crop_at_scale_one_is_a_window_of_the_image():
    image = torch.rand(3, 40, 50)
    crop = random_crop(image, (16, 16), 1.0, True, [0.3, 0.999, 0.0, 0.7])
    assert torch.equal(crop, image[:, 24:40, 0:16])
    mirrored = random_crop(image, (16, 16), 1.0, True, [0.3, 0.999, 0.0, 0.2])
    assert torch.equal(mirrored, crop.flip(-1))
    assert torch.equal(random_crop(image, (16, 16), 1.0, False, [0.3, 0.999, 0.0, 0.2]), crop)


@pytest.mark.parametrize(("draw", "expected"), [(0.0, 0.5), (0.5, 0.75), (1 - 1e-9, 1.0)])
def test_scale_is_drawn_between_its_minimum_and_one(draw, expected):
    crop = random_crop(ramp(200, 200), (40, 40), 0.5, False, [draw, 0.5, 0.5, 0.9])
    scale = 0.001 / (crop[0, 20, 30] - crop[0, 20, 10]).item() * 20
    assert scale == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("size", [(10, 300), (300, 10), (40, 60), (1, 1), (7, 7)])
def test_images_smaller_than_the_crop_are_scaled_up_to_it(size):
    for draw in (0.0, 0.9999):
        crop = random_crop(torch.rand(3, *size), (48, 48), 0.5, False, [draw] * 4)
        assert crop.shape == (3, 48, 48)
    crop = random_crop(ramp(24, 24), (48, 48), 0.5, False, [0.0] * 4)
    assert (crop[0, 0, 40] - crop[0, 0, 10]).item() == pytest.approx(0.0005 * 30, rel=1e-3)
    stretched = random_crop(ramp(24, 300), (48, 48), 0.5, False, [0.9999] * 4)
    assert (stretched[0, 0, 40] - stretched[0, 0, 10]).item() == pytest.approx(0.0005 * 30, rel=1e-3)


def test_an_image_is_never_scaled_below_the_crop():
    crop = random_crop(ramp(60, 90), (48, 48), 0.1, False, [0.0, 0.0, 0.0, 0.9])
    assert (crop[0, 0, 40] - crop[0, 0, 10]).item() == pytest.approx(0.001 * 60 / 48 * 30, rel=1e-2)


# ---------------------------------------------------------------- aspect-ratio buckets


def test_bucket_shapes_are_square_first_and_hold_no_more_pixels():
    assert bucket_sizes(128) == [(128, 128), (96, 160), (160, 96)]
    assert bucket_sizes(256) == [(256, 256), (192, 320), (224, 288), (288, 224), (320, 192)]
    assert bucket_sizes(40) == [(40, 40)]
    assert nearest_bucket((600, 1000), bucket_sizes(128)) == 1
    assert nearest_bucket((1000, 600), bucket_sizes(128)) == 2
    assert nearest_bucket((600, 640), bucket_sizes(128)) == 0


def test_a_bucketed_epoch_shows_every_image_in_blocks_of_one_shape():
    buckets = np.array([0] * 13 + [1] * 5 + [2] * 8)
    order = BucketedOrder(np.arange(26) + 100, buckets, 128, seed=0, block=4)
    assert len(order) == 4 * (4 + 2 + 2)
    sequences = set()
    for epoch in range(3):
        positions = range(epoch * len(order), (epoch + 1) * len(order))
        images = np.array([next(order.images_from(position)) for position in positions])
        assert set(images) == set(range(100, 126))
        shapes = [bucket_sizes(128).index(order.crop_size(position)) for position in positions]
        assert shapes == buckets[images - 100].tolist()
        sequences.add(tuple(shapes))
        assert all(len(set(shapes[start : start + 4])) == 1 for start in range(0, len(order), 4))
    assert len(sequences) == 3, "every epoch mixes the shapes anew"
