"""What a source of images is, and what all sources of image files share.

Shapes: C channels, H W pixels.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from latentcodec.files import read_regular
from latentcodec.pixels import LeftOut, UnreadableImage, decode_image, image_size
from latentcodec.pixels.notes import reason
from latentcodec.sources.labels import Labels


class SourceFailed(ValueError):
    """A set of images that is not read on, such as of a server that does not answer: no setting is wrong."""


class ImageSource(Protocol):
    """Images by number. The same number is the same image in every process and in every run."""

    left_out: list[LeftOut]
    """What looks like an image of this set and is not among the numbered ones, with the reasons."""

    @property
    def labels(self) -> Labels | None:
        """The classes of the images; None where the set has none, or none was asked for."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call the image in a message: its file, or its data set and row."""

    def read(self, index: int) -> Tensor:
        """The whole image, [C, H, W] float32 in [-1, 1]; `UnreadableImage`, with its name, when it is
        broken."""

    def size(self, index: int) -> tuple[int, int]:
        """Its height and width in pixels, from the file's header alone; `UnreadableImage` when that is
        broken."""


class EncodedSource:
    """What all sources of image files share: they differ only in where the encoded bytes lie."""

    channels: int
    left_out: list[LeftOut]
    labels: Labels | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        raise NotImplementedError

    def encoded(self, index: int) -> str | bytes:
        """The image's file name, or the bytes of its file; may raise `OSError`."""
        raise NotImplementedError

    def lengths(self) -> list[int]:
        """Bytes of every image's file, none of which is read; -1 where there is no file."""
        raise NotImplementedError

    def content(self, index: int) -> bytes:
        """The bytes of the image's file; `UnreadableImage`, with its name, where there is none."""
        with self._readable(index):
            encoded = self.encoded(index)
            return encoded if isinstance(encoded, bytes) else read_regular(encoded)

    def read(self, index: int) -> Tensor:
        with self._readable(index):
            encoded = self.encoded(index)
        return decode_image(encoded, self.channels, name=self.name(index))

    def size(self, index: int) -> tuple[int, int]:
        with self._readable(index):
            encoded = self.encoded(index)
        return image_size(encoded, name=self.name(index))

    @contextmanager
    def _readable(self, index: int) -> Iterator[None]:
        """Within, an `OSError` is an `UnreadableImage`: such as of a shard on a disk that is gone."""
        try:
            yield
        except OSError as error:
            raise UnreadableImage(f"{self.name(index)}: {reason(error)}") from error


def file_length(file: str) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return os.stat(file).st_size
    except OSError:  # such as a link to nowhere: reading the image will say so
        return -1
