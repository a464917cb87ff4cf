"""The usable images of a folder, one after another, for all who look at whole folders: benches and reports.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from latentcodec.pixels import LeftOut, UnreadableImage, find_images, load_image


class FolderImages:
    """Iterates over (path, image [C, H, W] in [-1, 1]); what cannot be used is listed in `left_out` on the way.

    Images of fewer than `smallest` pixels a side are not used. Each iteration reads the files anew, under a progress
    bar that says `what`. It ends with a ValueError, naming the first image and what is wrong with it, where none could
    be used; `find_images` raises where there is none.
    """

    def __init__(self, folder: str | Path, channels: int, smallest: int = 1, what: str = "reading") -> None:
        self.paths = find_images(folder)
        self.folder, self.channels, self.smallest, self.what = folder, channels, smallest, what
        self.left_out: list[LeftOut] = []

    def __iter__(self) -> Iterator[tuple[Path, Tensor]]:
        self.left_out.clear()
        for path in tqdm(self.paths, desc=self.what, unit="image", leave=False):
            try:
                image = load_image(path, self.channels)[0]
            except UnreadableImage as error:
                self.left_out.append(LeftOut(str(path), str(error)))
                continue
            height, width = image.shape[-2:]
            if min(height, width) < self.smallest:
                reason = f"{path}: {height} x {width} pixels, and {self.smallest} a side are needed"
                self.left_out.append(LeftOut(str(path), reason))
                continue
            yield path, image
        if len(self.left_out) == len(self.paths):
            first = self.left_out[0].reason
            raise ValueError(
                f"none of the {len(self.paths)} images in {self.folder} can be used; the first: {first}"
            )

    def usable(self) -> ImageFiles:
        """All images that can be used, found by reading each once; raises as iterating does."""
        return ImageFiles([path for path, _ in self], self.channels)


@dataclass(frozen=True)
class ImageFiles:
    """Images [C, H, W] in [-1, 1] that each loop reads anew, so that memory holds one at a time."""

    paths: list[Path]
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Tensor]:
        for path in self.paths:
            yield load_image(path, self.channels)[0]
