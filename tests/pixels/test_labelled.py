"""Grids with labels: the pictures keep their pixels, and text stands above them."""

import pytest
import torch

from latentcodec.pixels import image_grid, labelled_grid
from latentcodec.pixels.labelled import LINE


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_labels_stand_above_pictures_that_keep_their_pixels(channels):
    rows = [[torch.rand(channels, 20, 40) for _ in range(3)] for _ in range(2)]
    grid = labelled_grid(
        [("one", rows[0]), ("two", rows[1])], ["a", "b", "a name far too long for its place"]
    )
    assert grid.shape == (channels, 3 * LINE + 40, 3 * 40 + 4)
    for number, row in enumerate(rows):
        top = 2 * LINE + number * (20 + LINE)
        assert torch.equal(grid[:, top : top + 20], image_grid(row, columns=3))
        label = grid[:, top - LINE : top]
        assert label[0].min() < -0.9
        assert label[0].max() == 1
    names = grid[0, :LINE]
    assert names[:, 40:42].min() == names[:, 82:84].min() == 1  # each name ends where its picture does
    if channels == 4:
        assert (grid[3, :LINE] == 1).all()


def test_a_grid_without_names_has_its_rows_labels_only():
    assert labelled_grid([("one", [torch.zeros(3, 8, 8)])]).shape == (3, LINE + 8, 8)
