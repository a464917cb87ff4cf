"""Tensors of pixels: 8-bit levels, padding and its way back, the middle of a picture, grids of pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latentcodec.pixels import crop, crop_middle, from_uint8, image_grid, pad_to_multiple, to_uint8


def test_256_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert from_uint8(levels)[[0, 255]].tolist() == [-1, 1]


def test_to_uint8_rounds_to_the_nearest_level_and_clamps():
    x = torch.linspace(-1.5, 1.5, 10001, dtype=torch.float64)
    expected = np.clip(np.rint(127.5 * (x.numpy() + 1)), 0, 255)
    assert np.abs(to_uint8(x).numpy() - expected).max() <= 1  # float32 may fall to the other side of a half
    assert (to_uint8(x).numpy() != expected).sum() <= 5
    assert to_uint8(torch.tensor([-1e9, 1e9])).tolist() == [0, 255]
    half = from_uint8(torch.arange(256, dtype=torch.uint8)).bfloat16()
    assert torch.equal(to_uint8(half), to_uint8(half.float()))  # the sum is not rounded to bfloat16 once more


@pytest.mark.parametrize("size", [(1, 1), (7, 16), (16, 9), (13, 31), (16, 32)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_padding_equals_replicate_padding_and_crop_undoes_it(size, memory_format):
    x = torch.rand(2, 3, *size).to(memory_format=memory_format)
    rows, columns = -size[0] % 8, -size[1] % 8
    padded = pad_to_multiple(x, 8)
    assert torch.equal(padded, F.pad(x, (0, columns, 0, rows), mode="replicate"))
    assert torch.equal(crop(padded, size), x)
    assert torch.equal(pad_to_multiple(x[0, 0], 8), padded[0, 0])  # any number of leading dimensions


def test_an_aligned_picture_is_not_copied():
    x = torch.rand(1, 3, 16, 8)
    assert pad_to_multiple(x, 8) is x


@pytest.mark.parametrize(
    ("height", "width", "side", "rows", "columns"),
    [
        (10, 16, 4, (3, 7), (6, 10)),
        (9, 7, 4, (2, 6), (1, 5)),  # an odd rest: one more below and on the right
        (3, 12, 6, (0, 3), (3, 9)),  # a side that is shorter is whole
        (5, 5, 5, (0, 5), (0, 5)),
    ],
)
def test_the_middle_is_exactly_in_the_middle(height, width, side, rows, columns):
    image = torch.arange(3 * height * width).view(3, height, width)
    part = crop_middle(image, side)
    assert torch.equal(part, image[:, rows[0] : rows[1], columns[0] : columns[1]])
    assert part.shape[-2:] == (min(side, height), min(side, width))


@pytest.mark.parametrize("size", [(9, 8), (8, 9), (0, 8), (8, -1)])
def test_crop_refuses_a_size_that_is_not_inside(size):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels .* 8 x 8"):
        crop(torch.zeros(1, 3, 8, 8), size)


def test_a_grid_holds_its_images_with_white_between():
    images = [torch.rand(3, 4, 6) - 1 for _ in range(5)]
    grid = image_grid(images, columns=3)
    assert grid.shape == (3, 2 * 4 + 2, 3 * 6 + 2 * 2)
    covered = torch.zeros(grid.shape[1:], dtype=torch.bool)
    for i, image in enumerate(images):
        rows, columns = slice(i // 3 * 6, i // 3 * 6 + 4), slice(i % 3 * 8, i % 3 * 8 + 6)
        assert torch.equal(grid[:, rows, columns], image)
        covered[rows, columns] = True
    assert (grid[:, ~covered] == 1).all()


def test_a_grid_is_no_wider_than_its_images():
    assert image_grid([torch.zeros(1, 4, 6)] * 2, columns=8).shape == (1, 4, 14)


@pytest.mark.parametrize("shapes", [[], [(3, 4, 4), (3, 4, 5)]])
def test_a_grid_refuses_no_images_and_unequal_ones(shapes):
    with pytest.raises(ValueError, match="grid"):
        image_grid([torch.zeros(shape) for shape in shapes], columns=2)
