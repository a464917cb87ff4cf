"""The same crops seen through several codecs, their KLTs and image formats: what a viewer on a page shows.

Shapes: C channels, H W pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcodec.pixels import load_image
from latentcodec.quality import image_codecs
from latentcodec.quality.metrics import Codec, reconstruct
from latentcodec.report.pictures import webp
from latentcodec.report.results import decibels

WINDOW, SMALL_WINDOW = (
    192,
    128,
)  # pixels a side of a crop; the second where many choices would make the page large
MANY = 8


def compared_crops(
    codecs: Mapping[str, Codec],
    klts: Mapping[str, Codec],
    paths: Sequence[Path],
    psnrs: Sequence[Sequence[float]],
    formats: Sequence[str],
    sizes: Sequence[int],
) -> dict[str, Any]:
    """For the JSON of a result: `viewer` and `pictures`, of the worst, the median and the best image.

    psnrs: of each codec the PSNR of each image; the images are ranked by their mean over the codecs. The crop is that
    with the largest error of the first codec. sizes: bytes that each image may take in an image format.
    """
    ranks = torch.tensor(psnrs).mean(0).argsort().tolist()
    picked = dict(
        zip(("best", "median", "worst"), (ranks[-1], ranks[len(ranks) // 2], ranks[0]), strict=True)
    )
    window = SMALL_WINDOW if len(codecs) + len(klts) + len(formats) > MANY else WINDOW
    viewer, pictures = [], {}
    for word, i in reversed(picked.items()):
        channels = getattr(next(iter(codecs.values())), "image_channels", 3)
        x = load_image(paths[i], channels)
        seen: dict[str, Tensor] = {"original": x}
        seen |= {name: reconstruct(codec, x) for name, codec in (*codecs.items(), *klts.items())}
        if channels in (1, 3):
            coded = {form: image_codecs.code(x, form, sizes[i]) for form in formats}
            seen |= {_label(form, file.size, sizes[i]): file.image for form, file in coded.items()}
        first = seen[next(iter(codecs))]
        rows, columns = worst_window((first - x).square().mean(1)[0], window)
        choices = []
        for name, image in seen.items():
            pictures[f"{i} {name}"] = webp(image[0, :, rows, columns])
            choices.append({"label": name, "picture": f"{i} {name}"})
        viewer.append(
            {
                "label": f"{word}: {paths[i].name}, {decibels(psnrs[0][i], 1)} dB",
                "image": i,
                "choices": choices,
            }
        )
    return {"viewer": viewer, "pictures": pictures}


def _label(form: str, size: int, most_bytes: int) -> str:
    """What an image format is called beside a codec's bits: not every one can be as small."""
    return f"{form}, same bits" if size <= most_bytes else f"{form}, {size / most_bytes:.1f} x the bits"


def worst_window(error: Tensor, side: int) -> tuple[slice, slice]:
    """[H, W] squared error -> rows and columns of the window of largest mean; a small image as a whole."""
    height, width = (min(side, length) for length in error.shape)
    means = F.avg_pool2d(error[None, None], (height, width), stride=8)[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return slice(8 * row, 8 * row + height), slice(8 * column, 8 * column + width)
