"""Images that lie in one array: idx files (MNIST, Fashion-MNIST) and npz files (numpy), with their labels.

An idx file is a header of big-endian numbers (two zero bytes, the type, the number of sides, the sides) and then the
values; MNIST's own page describes it. The files of a set are named `train-images-idx3-ubyte` and
`train-labels-idx1-ubyte`, those of its test part `t10k-...`, each perhaps with `.gz`.

Shapes: N images, C channels, H W pixels.
"""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentcodec.pixels import LeftOut, from_uint8
from latentcodec.pixels.colour import with_channels
from latentcodec.sources.labels import Labels

UNSIGNED_BYTES = 8  # the type of an idx file's values
PARTS = {"train": "train", "test": "t10k", "validation": "t10k"}  # split -> how the files of a set begin
NPZ_ERRORS: tuple[
    type[Exception], ...
] = (  # of numpy and zipfile, for damaged, packed, hostile and other files
    *(OSError, EOFError, ValueError, MemoryError, OverflowError, RuntimeError, AttributeError),
    *(zlib.error, zipfile.BadZipFile),
)


class ArraySource:
    """The images of an array, by number."""

    def __init__(self, images: NDArray[np.uint8], labels: Labels | None, name: str, channels: int) -> None:
        """images [N, H, W] or [N, H, W, C]; C 1, 3 or 4."""
        self.images, self.labels, self.label, self.channels = images, labels, name, channels
        self.left_out: list[LeftOut] = []

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.label} image {index}"

    def read(self, index: int) -> Tensor:
        """[C, H, W] float32 in [-1, 1], with the channels that were asked for, as `decode_image` makes them."""
        pixels = from_uint8(torch.from_numpy(self.images[index].copy()))
        image = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return with_channels(image[:3], image[3:] if len(image) == 4 else None, self.channels)

    def size(self, index: int) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]

    def lengths(self) -> list[int]:
        """Bytes of every image."""
        return [math.prod(self.images.shape[1:])] * len(self.images)

    def content(self, index: int) -> bytes:
        """The bytes of an image: equal for equal images."""
        return self.images[index].tobytes()


# ---- idx


def is_idx(path: Path) -> bool:
    """Whether a file is named as those of MNIST are."""
    return path.is_file() and "-idx" in path.name


def idx_files(folder: Path) -> list[Path]:
    """The files of images of a folder that holds a set of idx files."""
    return sorted(path for path in folder.glob("*images*-idx*") if path.is_file())


def open_idx(path: Path, split: str, channels: int) -> ArraySource:
    """A file of images, or the one in a folder for a split (train, test); labels from the file beside it.

    Raises ValueError naming the file and what is wrong with it.
    """
    if path.is_dir():
        path = _of_split(idx_files(path), split, path)
    images = read_idx(path)
    if images.ndim != 3:
        raise ValueError(f"{path}: holds {images.ndim} sides; images are [N, H, W]: give the file of images")
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    found = next((p for p in (beside, _other_ending(beside)) if p.is_file() and p != path), None)
    labels = None
    if found is not None:
        numbers = read_idx(found)
        if numbers.shape != images.shape[:1]:
            raise ValueError(f"{found}: holds {numbers.shape} labels for {len(images)} images of {path}")
        labels = Labels.of(numbers.tolist(), None, str(found))
    return ArraySource(images, labels, str(path), channels)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of bytes in an idx file. Raises ValueError where it is none, or not whole."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path}: not an idx file, which begins with two zero bytes")
    kind, sides = content[2], content[3]
    if kind != UNSIGNED_BYTES:
        raise ValueError(
            f"{path}: values of type {kind}; images and labels are unsigned bytes ({UNSIGNED_BYTES})"
        )
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(sides)]
    values = np.frombuffer(content, np.uint8, offset=min(4 + 4 * sides, len(content)))
    if not sides or math.prod(shape) != len(values) or not len(values):
        raise ValueError(f"{path}: {len(values)} values, and its header says {' x '.join(map(str, shape))}")
    return values.reshape(shape)


def _of_split(files: list[Path], split: str, folder: Path) -> Path:
    start = PARTS.get(split, split)
    named = [file for file in files if file.name.startswith(start)]
    if len(named) != 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"{folder}: no file of images for data.split {split!r} ({start}-...); it has {names}"
        )
    return named[0]


def _other_ending(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")


# ---- npz


def open_npz(
    path: Path, split: str, image_column: str | None, label_column: str | None, channels: int
) -> ArraySource:
    """The arrays of an npz file: by their names, or those that the split's names or shapes point to.

    Without names the images are `x_train` or `train_images` (by the split), `images` or `x`, or the only array of
    bytes with three or four sides; labels are found in the same way, and there need not be any. Raises ValueError
    naming the file, its arrays and the key.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
            arrays = {name: value for name, value in content.items() if isinstance(value, np.ndarray)}
    except NPZ_ERRORS as error:
        raise ValueError(f"{path}: not an npz file that can be read ({error})") from error
    listed = (
        ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in arrays.items()) or "none"
    )
    guesses = (f"x_{split}", f"{split}_images", "images", "x")
    images = _named(arrays, image_column, guesses, "data.image_column", f"{path} (its arrays: {listed})")
    if images is None:
        found = [array for array in arrays.values() if array.dtype == np.uint8 and array.ndim in (3, 4)]
        if len(found) != 1:
            raise ValueError(f"{path}: which array holds the images? Name it as data.image_column: {listed}")
        images = found[0]
    right = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3, 4))
    if images.dtype != np.uint8 or not right or not images.size:
        raise ValueError(f"{path}: images are bytes [N, H, W] or [N, H, W, 1, 3 or 4], here: {listed}")
    guesses = (f"y_{split}", f"{split}_labels", "labels", "y")
    values = _named(arrays, label_column, guesses, "data.label_column", f"{path} (its arrays: {listed})")
    if values is None:
        return ArraySource(images, None, str(path), channels)
    if values.size != len(images):
        raise ValueError(f"{path}: {values.size} labels for {len(images)} images")
    return ArraySource(images, Labels.of(values.reshape(-1).tolist(), None, str(path)), str(path), channels)


def _named(
    arrays: dict[str, NDArray], name: str | None, guesses: tuple[str, ...], key: str, where: str
) -> NDArray | None:
    if name is not None and name not in arrays:
        raise ValueError(f"{where}: there is no {name!r} ({key})")
    return next((arrays[guess] for guess in ((name,) if name else guesses) if guess in arrays), None)
