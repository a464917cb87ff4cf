"""A grid of pictures that says what its rows and columns are.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentcodec.pixels.tensors import from_uint8, image_grid

LINE = 15  # pixels: the height of a line of text
MARGIN = 2


def labelled_grid(rows: Sequence[tuple[str, Sequence[Tensor]]], names: Sequence[str] = ()) -> Tensor:
    """Rows of equal sized [C, H, W] in [-1, 1], each under its label, as one [C, H', W']; black on white.

    `names` of the columns stand above the first row, cut where they are wider than a picture. The lines of text are all
    that is added: pictures keep their pixels. Raises what `image_grid` raises.
    """
    grids = [image_grid(list(pictures), columns=len(pictures)) for _, pictures in rows]
    width = max(grid.shape[-1] for grid in grids)
    columns = len(rows[0][1])
    step = (grids[0].shape[-1] + MARGIN) // columns
    parts = []
    if names:
        parts.append(
            _line(width, [(k * step, step - MARGIN, name) for k, name in enumerate(names[:columns])])
        )
    for (label, _), grid in zip(rows, grids, strict=True):
        parts += [_line(width, [(0, width, label)]), _widened(grid, width)]
    channels = grids[0].shape[0]
    return torch.cat([_with_channels(part, channels) for part in parts], dim=1)


def _line(width: int, texts: Sequence[tuple[int, int, str]]) -> Tensor:
    """A line of text [1, LINE, width]: each (left, room, text), cut to its room."""
    sheet = Image.new("L", (width, LINE), 255)
    font = ImageFont.load_default()
    for left, room, text in texts:
        part = Image.new("L", (max(1, room), LINE), 255)
        ImageDraw.Draw(part).text(
            (1, 1), text.encode("latin-1", "replace").decode("latin-1"), fill=0, font=font
        )
        sheet.paste(part, (left, 0))
    return from_uint8(torch.from_numpy(np.array(sheet)))[None]


def _widened(grid: Tensor, width: int) -> Tensor:
    wide = grid.new_ones(grid.shape[0], grid.shape[1], width)
    wide[..., : grid.shape[-1]] = grid
    return wide.float().cpu()


def _with_channels(part: Tensor, channels: int) -> Tensor:
    """Text in all channels; opaque where there is alpha, since white is 1 in each."""
    if part.shape[0] == channels:
        return part
    text = part.expand(channels, -1, -1).clone()
    if channels == 4:
        text[3] = 1
    return text
