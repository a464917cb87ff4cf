"""Which images a run trains on, and which are held out to validate it.

Where images come from is in `sources/`, which image stands where in the stream in `order.py`, how crops are cut
in `crops.py`. Shapes: C channels, H W pixels.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from latentcodec.pixels import LeftOut, UnreadableImage, collect_notes, crop_middle
from latentcodec.sources.images import ArraySource, EncodedSource, ImageSource, Place, open_source
from latentcodec.sources.remote import RemoteSource
from latentcodec.training.data.config import DataConfig
from latentcodec.training.data.crops import Reject, pad_edges, rejected
from latentcodec.training.data.order import bucket_sizes, nearest_bucket, shuffled
from latentcodec.training.progress import counted

HELD_OUT = -1  # stands in the place of the epoch's number for the choice of the held-out images
CHOSEN = -2  # and for the choice of fewer training images


@dataclass(frozen=True)
class TrainingImages:
    """An opened set: what is trained on, and which images of `val_source` it is validated on."""

    config: DataConfig
    seed: int
    source: ImageSource | RemoteSource
    train: NDArray[np.int64]  # indices into source; empty for a remote source, which cannot be asked by index
    val_source: ImageSource
    val: NDArray[np.int64]  # indices into val_source

    @property
    def left_out(self) -> list[LeftOut]:
        """What looks like an image of these sets and is not among them."""
        both = [self.source] if self.source is self.val_source else [self.source, self.val_source]
        return [item for source in both for item in source.left_out]

    @property
    def counts(self) -> list[int]:
        """Numbers of training and of validation images; of a remote set 0 are known to be trained on."""
        return [len(self.train), len(self.val)]

    @cached_property
    def digest(self) -> str:
        """Another one where an image of the sets was exchanged for another.

        It covers the name and the length of every image, and the content of those that are held out.
        """
        return self._digest_of(EncodedSource, ArraySource)

    @cached_property
    def digest_without_arrays(self) -> str:
        """As an earlier version took it: its checkpoints of idx and npz sets hold this one."""
        return self._digest_of(EncodedSource)

    def _digest_of(self, *kinds: type[EncodedSource | ArraySource]) -> str:
        found = hashlib.blake2b(digest_size=16)
        for source in (self.source, self.val_source):
            if isinstance(source, kinds):
                for index, length in enumerate(source.lengths()):
                    found.update(
                        f"{PurePath(source.name(index)).name}\n{length}\n".encode(errors="backslashreplace")
                    )
        if isinstance(self.val_source, kinds):
            for index in self.val.tolist():
                found.update(_digest(self.val_source, index) or b"unreadable")
        return found.hexdigest()

    @cached_property
    def buckets(self) -> NDArray[np.int64]:
        """The aspect-ratio bucket of every image of `train`; the headers are read once, not for every stream."""
        assert not isinstance(self.source, RemoteSource)
        sizes = bucket_sizes(self.config.resolution)
        padding = self.config.padding
        return np.array([_bucket(self.source, index, padding, sizes) for index in self.train.tolist()])


def open_images(config: DataConfig, channels: int, seed: int) -> TrainingImages:
    """Opens the images and sets some aside for validation.

    The seed chooses which of the training set are held out. From a `val_path` of their own they are taken
    evenly, the same for every seed. Of these none is trained on, under whatever name it lies in both sets; and of a
    `val_path` inside `path` nothing is.
    Raises `ValueError` naming the path and the key when there is nothing to read, or nothing left to train on.
    """
    if config.streaming:
        return _open_remote(config, channels, seed)
    columns = (config.image_column, channels, config.label_column, config.drawn)
    source = open_source(_place(config), *columns)
    if config.val_images and (config.val_path or config.val_split):
        val_source = open_source(_val_place(config), *columns)
        count = min(config.val_images, len(val_source))
        val = np.linspace(0, len(val_source) - 1, count).round().astype(np.int64)
        train = _others(source, val_source, val)
    else:
        val_source = source
        order = shuffled(np.arange(len(source)), seed, HELD_OUT)
        train, val = map(np.sort, np.split(order, [max(0, len(source) - config.val_images)]))
    if config.train_images is not None:
        train = np.sort(shuffled(train, seed, CHOSEN)[: config.train_images])
    if len(train) == 0:
        raise ValueError(
            f"{config.path}: of {len(source)} images {len(val)} are held out for validation and none is left "
            "to train on; lower data.val_images, or give data.val_path"
        )
    return TrainingImages(config, seed, source, train, val_source, val)


def _others(source: ImageSource, val_source: ImageSource, val: NDArray[np.int64]) -> NDArray[np.int64]:
    """The images of `source` that are none of the chosen ones of `val_source`: none of their files, byte by byte.

    Where `val_source` is a part of `source` by its names, as a folder inside a folder is, all of that part goes.
    Of the training images only those are read whose files have the length of a validation image's.
    """
    if not (
        isinstance(source, EncodedSource | ArraySource)
        and isinstance(val_source, EncodedSource | ArraySource)
    ):
        names = {val_source.name(index) for index in val.tolist()}  # of the drawn set
        return np.array([i for i in range(len(source)) if source.name(i) not in names], dtype=np.int64)
    lengths = np.array(source.lengths())
    held = {_digest(val_source, index) for index in val.tolist()} - {None}
    length = np.array(val_source.lengths())[val]
    alike = np.flatnonzero(np.isin(lengths, length[length >= 0]))
    copies = [index for index in alike.tolist() if _digest(source, index) in held]
    names = {val_source.name(index) for index in range(len(val_source))}
    part = [index for index in range(len(source)) if source.name(index) in names]
    left_out = copies + part if len(part) < len(source) else copies
    return np.setdiff1d(np.arange(len(source)), np.array(left_out, dtype=np.int64))


def _digest(source: EncodedSource | ArraySource, index: int) -> bytes | None:
    """Of an image's file; None where there is none, which its turn to be read will say."""
    try:
        return hashlib.blake2b(source.content(index)).digest()
    except UnreadableImage:
        return None


def _place(config: DataConfig) -> Place:
    return Place(config.path, config.subset, config.split)


def _val_place(config: DataConfig) -> Place:
    subset = config.subset if config.val_path is None else None
    return Place(config.val_path or config.path, subset, config.val_split or config.split)


def _open_remote(config: DataConfig, channels: int, seed: int) -> TrainingImages:
    column, buffer = config.image_column, config.shuffle_buffer
    source = val_source = RemoteSource(_place(config), column, channels, buffer)
    if config.val_path or config.val_split:
        val_source = RemoteSource(_val_place(config), column, channels, buffer)
    val = val_source.first(config.val_images)
    source.exclude(val.cells)
    return TrainingImages(config, seed, source, np.arange(0), val, np.arange(len(val)))


@dataclass(frozen=True)
class HeldOut:
    """The validation images that could be read, their names, and which could not."""

    images: list[Tensor]  # each [C, H, W] float32 in [-1, 1]
    names: list[str]
    rejects: list[Reject]
    too_small: list[str]
    """Names of images that are sound, but too small for a score."""
    classes: list[str] = field(default_factory=list)
    """What each image is of; empty where the set has no labels."""


def held_out(images: TrainingImages, smallest_side: int = 1) -> HeldOut:
    """Reads the validation images: whole, but centre-cropped to at most `val_resolution` on a side.

    One with a side of fewer than `smallest_side` pixels, on which no score can be computed, is left out. Raises
    `ValueError` when not one of them can be used, or `val_resolution` would leave fewer of each.
    """
    if len(images.val) and images.config.val_resolution < smallest_side:
        raise ValueError(
            f"data.val_resolution {images.config.val_resolution} leaves fewer than the {smallest_side} pixels a side "
            "which a score needs; raise it"
        )
    result, labels = HeldOut([], [], [], []), images.val_source.labels
    for index in counted(images.val.tolist(), "reading the validation images", len(images.val), "image"):
        try:
            with (
                collect_notes()
            ):  # training would meet them in a worker, and lists them; here they cost nothing
                image = pad_edges(images.val_source.read(index), images.config.padding)
        except UnreadableImage as error:
            result.rejects.append(rejected(images.val_source.name(index), error))
            continue
        if min(image.shape[-2:]) < smallest_side:
            result.too_small.append(images.val_source.name(index))
            continue
        result.images.append(crop_middle(image, images.config.val_resolution).contiguous())
        result.names.append(images.val_source.name(index))
        if labels is not None:
            result.classes.append(labels.name(index))
    if result.rejects and not result.images:
        first = result.rejects[0]
        raise ValueError(
            f"none of the validation images can be read, the first: {first.path}: {first.reason}"
        )
    if result.too_small and not result.images:
        raise ValueError(
            f"all {len(result.too_small)} validation images are smaller than {smallest_side} pixels a side, which a "
            f"score needs, such as {result.too_small[0]}; give larger ones as data.val_path"
        )
    return result


def _bucket(source: ImageSource, index: int, padding: int, sizes: list[tuple[int, int]]) -> int:
    try:
        height, width = source.size(index)
        return nearest_bucket((height + 2 * padding, width + 2 * padding), sizes)
    except UnreadableImage:
        return 0  # it will be replaced, and listed, when its turn comes
