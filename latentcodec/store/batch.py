"""EncodeBatch: pictures to latents inside somebody else's pipeline: `datasets.map`, Ray Data, Spark, a plain loop.

A picture that cannot be read becomes a row with an error; it neither stops the pipeline nor takes its neighbours along.
For a store that resumes exactly use `latentcodec encode`; this gives arrays and leaves writing to the pipeline.

Shapes: B batch, c latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from latentcodec.machine import usable_device
from latentcodec.pixels import UnreadableImage
from latentcodec.store.format import Settings
from latentcodec.store.picture import Pixels, checked_sizes, read_pixels

if TYPE_CHECKING:
    from latentcodec.codec import LatentCodec


class EncodeBatch:
    """A function from a batch of pictures to a batch of latents; it can be sent to another process.

        datasets.map(EncodeBatch("photo-f8c16", size=256), batched=True, batch_size=16)

    A batch is a dictionary of equally long columns: `image` (PIL images, or the dictionaries of an undecoded
    `datasets.Image` column) or `bytes` (the bytes of image files), and `path`, what messages call a picture. The answer
    has `path`, `latent` ([c, h, w] float32 arrays, None for a broken picture) and `error` (None, or the reason).
    """

    def __init__(
        self,
        codec: LatentCodec | str,
        size: int | None = None,
        area: int | None = None,
        multiple: int | None = None,
        device: str | None = None,
    ) -> None:
        """`size`, `area` and `multiple` as `latentcodec encode` has them. The codec is loaded at the first call.

        Raises ValueError for sizes that contradict each other: here, or at the first call where the codec decides it.
        """
        checked_sizes(1, size, area, multiple)
        self.source, self.device = codec, device
        self.size, self.area, self.multiple = size, area, multiple
        self._loaded: tuple[LatentCodec, Settings] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Encodes a batch; pictures of one size are encoded together."""
        self._loaded = self._loaded or self._load()
        codec, settings = self._loaded
        column = "image" if "image" in batch else "bytes"
        if column not in batch:
            raise ValueError(f"a batch needs a column 'image' or 'bytes'; it has {', '.join(batch)}")
        cells = list(batch[column])
        paths = [str(path) for path in batch["path"]] if "path" in batch else [""] * len(cells)
        latents: list[np.ndarray | None] = [None] * len(cells)
        errors: list[str | None] = [None] * len(cells)
        by_shape: dict[tuple[int, ...], list[tuple[int, Pixels]]] = {}
        for number, (cell, path) in enumerate(zip(cells, paths, strict=True)):
            try:
                pixels = read_pixels(_content(cell, path), path or f"picture {number}", settings, None)
                by_shape.setdefault(tuple(pixels.x.shape), []).append((number, pixels))
            except UnreadableImage as error:
                errors[number] = str(error)
        for group in by_shape.values():
            encoded = codec.encode(torch.stack([pixels.x for _, pixels in group])).cpu()
            for (number, _), latent in zip(group, encoded, strict=True):
                if latent.isfinite().all():
                    latents[number] = latent.numpy()
                else:
                    errors[number] = f"{paths[number] or f'picture {number}'}: its latent is not finite"
        return {"path": paths, "latent": latents, "error": errors}

    def _load(self) -> tuple[LatentCodec, Settings]:
        """The codec, on its device, and the sizes of its pictures."""
        from latentcodec.codec import LatentCodec, run_compiled

        given = self.source
        codec = given if isinstance(given, LatentCodec) else LatentCodec.from_pretrained(given)
        if self.device is not None:
            codec.vae.to(usable_device(self.device))
            run_compiled(codec)
        f = codec.downsampling_factor
        size, area, multiple = checked_sizes(f, self.size, self.area, self.multiple)
        return codec, Settings("", codec.latent_channels, f, codec.image_channels, size, area, multiple)


def _content(cell: Any, path: str) -> Any:
    """What `decode_image` reads: bytes, a file or a PIL image."""
    if isinstance(cell, Mapping):  # an undecoded cell of `datasets`
        cell = cell["path"] if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, bytearray | memoryview | np.bytes_):
        return bytes(cell)
    if cell is None:
        raise UnreadableImage(f"{path}: the cell is empty")
    return cell
