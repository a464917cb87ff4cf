"""Pictures for pages: lossless WebP as data URLs, crops that are never resized.

Shapes: C channels, H W pixels, c latent channels, h w latent cells.
"""

import base64
import io

import torch
from PIL import Image
from torch import Tensor

from latentcodec.pixels import to_uint8


def webp(picture: Tensor) -> str:
    """[C, H, W] in [-1, 1], C 1, 3 or 4, as the data URL of a lossless WebP; of other C the first channel."""
    if picture.shape[0] not in (1, 3, 4):
        picture = picture[:1]
    pixels = to_uint8(picture.float().cpu()).permute(1, 2, 0).squeeze(-1).numpy()  # [H, W, C] or [H, W]
    return data_url(Image.fromarray(pixels))


def data_url(image: Image.Image) -> str:
    """A PIL image as the data URL of a lossless WebP."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=True, quality=50, method=2, exact=True)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def channel_picture(z: Tensor) -> Tensor:
    """[h, w] latents of about unit variance -> [1, h, w] in [-1, 1]: black is -2.5 deviations, white +2.5."""
    return ((z - z.mean()) / (2.5 * z.std(unbiased=False).clamp(min=1e-6))).clamp(-1, 1)[None]


def principal_colours(z: Tensor) -> Tensor:
    """[c, h, w] -> [3, h, w] in [-1, 1]: the latent's three principal components as red, green and blue."""
    cells = z.flatten(1).double()
    cells = cells - cells.mean(1, keepdim=True)
    directions = torch.linalg.eigh(cells @ cells.T).eigenvectors.flip(1)[:, :3].T  # [3 or fewer, c]
    shown = directions @ cells
    shown = shown / (2.5 * shown.std(1, keepdim=True).clamp(min=1e-9))
    picture = torch.zeros(3, cells.shape[1], dtype=shown.dtype)
    picture[: len(shown)] = shown
    return picture.clamp(-1, 1).float().unflatten(1, z.shape[1:])


def tiles(pictures: Tensor, columns: int) -> Tensor:
    """[N, C, H, W] -> [C, rows H, columns W], row by row, without gaps; missing ones at the end are black."""
    n, c, height, width = pictures.shape
    rows = -(-n // columns)
    sheet = torch.full((rows * columns, c, height, width), -1.0)
    sheet[:n] = pictures
    sheet = sheet.view(rows, columns, c, height, width).permute(2, 0, 3, 1, 4)
    return sheet.reshape(c, rows * height, columns * width)
