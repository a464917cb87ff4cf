"""The endless stream of training crops, and the images held out from it.

Everything random is a pure function of (seed, position), where `position` counts the samples of the stream
from its very beginning. So there is no state to save: a run resumes by starting its stream at its step, and R
ranks with batch b see what one rank sees with batch R*b. Only `data.streaming` falls short of that: see
`remote.py`. Where images come from is in `sources.py`, which one stands where in `order.py`. Shapes: B batch,
C channels, H W pixels.
"""

import hashlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from latentcodec.pixels import UnreadableImage
from latentcodec.sources.images import EncodedSource, ImageSource, Place, open_source
from latentcodec.sources.remote import RemoteSource
from latentcodec.training.data.crops import Batch, Cropping, CropStream, RemoteCropStream, centre_crop
from latentcodec.training.data.order import (
    BucketedOrder,
    EpochOrder,
    Positions,
    bucket_sizes,
    nearest_bucket,
    shuffled,
)
from latentcodec.training.progress import counted
from latentcodec.training.signals import held, shield_data_worker

HELD_OUT = -1  # stands in the place of the epoch's number for the choice of the held-out images


@dataclass
class DataConfig:
    """Which images to train on and how crops are cut from them."""

    path: str | None = None
    """A folder of images or tar shards, or a Hugging Face data set: hub id, local folder, parquet file. None:
    the built-in set of drawn pictures."""
    subset: str | None = None
    """The subset (configuration) of a Hugging Face data set that has several."""
    split: str = "train"
    """The split of a Hugging Face data set to train on; a slice such as train[:1000] works too."""
    image_column: str | None = None
    """The column of a Hugging Face data set that holds the images (in tar shards the part of the name after
    the dot). None: the only one that is declared to hold images."""
    resolution: int = 128
    """Height and width of the training crops, in pixels."""
    min_scale: float = 0.5
    """An image is scaled down by a random factor between this and 1 before it is cropped; 1 switches this
    off."""
    flip: bool = True
    """Mirror every second crop, left to right."""
    buckets: bool = False
    """Aspect-ratio buckets: every optimizer step has one crop shape, of about resolution^2 pixels, and images
    whose own shape is near it. Reads the header of every image first."""
    val_path: str | None = None
    """Validation images, understood like path. None: val_images of the training set are held out."""
    val_split: str | None = None
    """The split of a Hugging Face data set to validate on. None: the same as split."""
    val_images: int = 16
    """How many images to validate on; 0 switches validation off."""
    val_resolution: int = 512
    """Validation images are whole, but centre-cropped to at most this many pixels on a side."""
    streaming: bool = False
    """Read a Hugging Face data set over the network while training instead of fetching it first. The order
    then depends on the number of ranks and workers, and only with the same numbers is a resume exact."""
    shuffle_buffer: int = 1000
    """With streaming: how many encoded images each worker keeps to draw the next one from."""
    workers: int = 2
    """Processes that read and crop images; 0 reads them in the training process."""
    prefetch: int = 4
    """Micro-batches that each worker prepares ahead."""

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"data.min_scale must lie in (0, 1], not {self.min_scale}")
        for key in ("resolution", "val_resolution", "prefetch", "shuffle_buffer"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key} must be at least 1, not {getattr(self, key)}")
        for key in ("val_images", "workers"):
            if getattr(self, key) < 0:
                raise ValueError(f"data.{key} must not be negative, not {getattr(self, key)}")
        if self.streaming and self.path is None:
            raise ValueError("data.streaming needs a data.path; the drawn set is made on the spot")
        if self.streaming and self.buckets:
            raise ValueError("data.buckets needs the shapes of all images, which data.streaming cannot give")


@dataclass(frozen=True)
class TrainingImages:
    """An opened set: what is trained on, and which images of `val_source` it is validated on."""

    config: DataConfig
    seed: int
    source: ImageSource | RemoteSource
    train: NDArray[np.int64]  # indices into source; empty for a remote source, which cannot be asked by index
    val_source: ImageSource
    val: NDArray[np.int64]  # indices into val_source

    @cached_property
    def buckets(self) -> NDArray[np.int64]:
        """The aspect-ratio bucket of every image of `train`; the headers are read once, not for every stream."""
        assert not isinstance(self.source, RemoteSource)
        sizes = bucket_sizes(self.config.resolution)
        return np.array([_bucket(self.source, index, sizes) for index in self.train.tolist()])


def open_images(config: DataConfig, channels: int, seed: int) -> TrainingImages:
    """Opens the images and sets some aside for validation.

    The seed chooses which of the training set are held out. From a `val_path` of their own they are taken
    evenly, the same for every seed; an image that lies in both sets, under whatever name, is not trained on.
    Raises `ValueError` naming the path and the key when there is nothing to read, or nothing left to train on.
    """
    if config.streaming:
        return _open_remote(config, channels, seed)
    source = open_source(_place(config), config.image_column, channels)
    if config.val_images and (config.val_path or config.val_split):
        val_source = open_source(_val_place(config), config.image_column, channels)
        count = min(config.val_images, len(val_source))
        val = np.linspace(0, len(val_source) - 1, count).round().astype(np.int64)
        train = _others(source, val_source, val)
    else:
        val_source = source
        order = shuffled(np.arange(len(source)), seed, HELD_OUT)
        train, val = map(np.sort, np.split(order, [max(0, len(source) - config.val_images)]))
    if len(train) == 0:
        raise ValueError(
            f"{config.path}: of {len(source)} images {len(val)} are held out for validation and none is left "
            "to train on; lower data.val_images, or give data.val_path"
        )
    return TrainingImages(config, seed, source, train, val_source, val)


def _others(source: ImageSource, val_source: ImageSource, val: NDArray[np.int64]) -> NDArray[np.int64]:
    """The images of `source` that are none of the chosen ones of `val_source`: none of their files, byte by byte.

    Of the training images only those are read whose files have the length of a validation image's.
    """
    if not (isinstance(source, EncodedSource) and isinstance(val_source, EncodedSource)):
        names = {val_source.name(index) for index in val.tolist()}  # of the drawn set
        return np.array([i for i in range(len(source)) if source.name(i) not in names], dtype=np.int64)
    lengths = np.array(source.lengths())
    held = {_digest(val_source, index) for index in val.tolist()} - {None}
    length = np.array(val_source.lengths())[val]
    alike = np.flatnonzero(np.isin(lengths, length[length >= 0]))
    copies = [index for index in alike.tolist() if _digest(source, index) in held]
    return np.setdiff1d(np.arange(len(source)), np.array(copies, dtype=np.int64))


def _digest(source: EncodedSource, index: int) -> bytes | None:
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
    """The validation images that could be read, their names, and a line for each that could not."""

    images: list[Tensor]  # each [C, H, W] float32 in [-1, 1]
    names: list[str]
    rejected: list[str]


def held_out(images: TrainingImages) -> HeldOut:
    """Reads the validation images: whole, but centre-cropped to at most `val_resolution` on a side.

    Raises `ValueError` when not one of them can be read.
    """
    result = HeldOut([], [], [])
    for index in counted(images.val.tolist(), "reading the validation images", len(images.val), "image"):
        try:
            image = images.val_source.read(index)
        except UnreadableImage as error:
            result.rejected.append(str(error))
            continue
        result.images.append(centre_crop(image, images.config.val_resolution))
        result.names.append(images.val_source.name(index))
    if result.rejected and not result.images:
        raise ValueError(f"none of the validation images can be read, the first: {result.rejected[0]}")
    return result


class Batches:
    """The micro-batches of one rank, and how long the trainer has waited for them so far (`waited_seconds`).

    Leaving the loop, or dropping its iterator, ends the worker processes.
    """

    def __init__(self, loader: Iterable[Batch | ValueError]) -> None:
        self.loader = loader
        self.waited_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        asked = time.perf_counter()
        with held():
            batches = iter(self.loader)  # starts the workers
        for batch in batches:
            self.waited_seconds += time.perf_counter() - asked
            if isinstance(batch, ValueError):
                raise batch
            yield batch
            asked = time.perf_counter()


def training_batches(
    images: TrainingImages,
    batch_size: int,
    *,
    accumulation: int = 1,
    start_step: int = 0,
    steps: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Batches:
    """The micro-batches of one rank from `start_step` on, `accumulation` for each of `steps` optimizer steps.

    Bit-identical for any number of workers; endless when `steps` is None. Iterating raises `ValueError` when
    the set turns out to hold nothing that can be read.
    """
    config = images.config
    positions = Positions(batch_size, accumulation, start_step, steps, rank, world_size)
    cropping = Cropping(images.seed, config.min_scale, config.flip)
    stream: Dataset[Batch | ValueError]
    if isinstance(images.source, RemoteSource):
        stream = RemoteCropStream(images.source, positions, cropping, config.resolution)
    else:
        block = batch_size * accumulation * world_size
        stream = CropStream(images.source, _order(images, block), cropping)
    loader: DataLoader[Batch | ValueError] = DataLoader(
        stream,
        sampler=None if isinstance(stream, IterableDataset) else positions,
        batch_size=None,  # every item is a whole batch already
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else starting the workers would draw from the global one
    )
    return Batches(loader)


def _order(images: TrainingImages, block: int) -> EpochOrder:
    resolution = images.config.resolution
    if not images.config.buckets:
        return EpochOrder(images.train, resolution, images.seed)
    return BucketedOrder(images.train, images.buckets, resolution, images.seed, block)


def _bucket(source: ImageSource, index: int, sizes: list[tuple[int, int]]) -> int:
    try:
        return nearest_bucket(source.size(index), sizes)
    except UnreadableImage:
        return 0  # it will be replaced, and listed, when its turn comes


def _start_worker(worker: int) -> None:
    """Leaves signals to the trainer, and the moment the trainer is gone, leaves as well."""
    shield_data_worker(worker)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
