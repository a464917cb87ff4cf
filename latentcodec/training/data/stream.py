"""The endless stream of training crops: batches for one process, read and cropped by its worker processes.

Everything random is a pure function of (seed, position), where `position` counts the samples of the stream from its
very beginning. So there is no state to save: a run resumes by starting its stream at its step, and R ranks with batch
b see what one rank sees with batch R*b. Only `data.streaming` falls short of that: see `sources/remote.py`. Which
images there are is in `images.py`, which one stands where in `order.py`. Shapes: B batch, C channels, H W pixels.
"""

import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from latentcodec.sources.encoded import SourceFailed
from latentcodec.sources.remote import RemoteSource
from latentcodec.training.data.config import DataConfig
from latentcodec.training.data.crops import Batch, Cropping, CropStream, RemoteCropStream
from latentcodec.training.data.images import TrainingImages
from latentcodec.training.data.order import BucketedOrder, EpochOrder, Positions
from latentcodec.training.data.text import find_fonts
from latentcodec.training.progress import counted
from latentcodec.training.signals import held, shield_data_worker
from latentcodec.training.watchdog import READING, doing

SHARED_MEMORY = "/dev/shm"
SHARED_MEMORY_RESERVE = 2  # times what the batches need: other processes, and other streams, use it too
START_CROPS = 64  # for the linear start: more change its PSNR by less than 0.1 dB
START_CELLS = (
    1024  # at least, since that many blocks fix a hundred principal components: small crops have few each
)
START_PARTS = 8  # in which they are read


class SharedMemoryWarning(UserWarning):
    """Batches take a slower way, since shared memory is too small for them."""


class Batches:
    """The micro-batches of one rank, and how long the trainer has waited for them so far (`waited_seconds`).

    Leaving the loop, or dropping its iterator, ends the worker processes.
    """

    def __init__(self, loader: Iterable[Batch | ValueError], workers: int = 0, far: bool = False) -> None:
        """With `far` the first batch of each worker may take as long as it takes."""
        self.loader = loader
        self.firsts = max(1, workers)  # batches
        self.untimed = self.firsts if far else 0  # batches
        self.waited_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        asked = time.perf_counter()
        doing(READING, timed=self.untimed == 0)
        with held():
            batches = _received(iter(self.loader))  # starts the workers
        hopeless: ValueError | None = None
        for number, batch in enumerate(batches, start=1):
            self.waited_seconds += time.perf_counter() - asked
            if isinstance(batch, ValueError):
                hopeless = batch
                break
            yield _as_tensors(batch)
            asked = time.perf_counter()
            doing(READING, timed=number >= self.untimed)
        # This ends the workers. An error would hold them, and torch waits five seconds for each one later.
        del batches
        if hopeless is None:
            return
        if number <= self.firsts:
            raise hopeless
        raise SourceFailed(str(hopeless)) from hopeless


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
    drawn: bool = True,
) -> Batches:
    """The micro-batches of one rank from `start_step` on, `accumulation` for each of `steps` optimizer steps.

    Bit-identical for any number of workers; endless when `steps` is None. `drawn`: with text over `data.text_share` of
    the crops. Iterating raises `ValueError` when the set turns out to hold nothing that can be read, and `SourceFailed`
    when that is so later.
    """
    config = images.config
    positions = Positions(batch_size, accumulation, start_step, steps, rank, world_size)
    text_share = config.text_share if drawn else 0.0
    fonts = tuple(find_fonts(config.text_fonts_left_out)) if text_share else ()
    cropping = Cropping(images.seed, config.min_scale, config.flip, text_share, fonts, config.padding)
    stream: Dataset[Batch | ValueError]
    far = False
    if isinstance(images.source, RemoteSource):
        # Each worker reads its way there from the beginning of its lane, which may take hours.
        far = start_step > 0
        stream = RemoteCropStream(images.source, positions, cropping, config.resolution)
    else:
        block = batch_size * accumulation * world_size
        stream = CropStream(images.source, _order(images, block), cropping)
    side, channels = config.resolution, getattr(images.source, "channels", 3)
    batch_bytes = 4 * channels * side * side * batch_size
    loader: DataLoader[Batch | ValueError] = DataLoader(
        stream,
        sampler=None if isinstance(stream, IterableDataset) else positions,
        batch_size=None,  # every item is a whole batch already
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        collate_fn=_as_is if _fits_shared_memory(batch_bytes, config) else _as_arrays,
        generator=torch.Generator(),  # else starting the workers would draw from the global one
    )
    return Batches(loader, config.workers, far)


def first_crops(images: TrainingImages, f: int = 1) -> list[Tensor]:
    """The first crops [C, H, W] of the stream, of one size, the same in every process.

    So many that they have a thousand blocks of f x f pixels, and at least 64.
    """
    cells = max(1, images.config.resolution // f) ** 2
    size = max(START_CROPS, -(-START_CELLS // cells)) // START_PARTS
    parts = training_batches(images, size, accumulation=START_PARTS, steps=1)  # of one step: one shape
    counted_parts = counted(parts, "reading the first crops", START_PARTS, "part")
    return [crop for part in counted_parts for crop in part["pixels"]]


def _order(images: TrainingImages, block: int) -> EpochOrder:
    resolution = images.config.resolution
    if not images.config.buckets:
        return EpochOrder(images.train, resolution, images.seed)
    return BucketedOrder(images.train, images.buckets, resolution, images.seed, block)


def _fits_shared_memory(batch_bytes: int, config: DataConfig) -> bool:
    """Whether the batches that wait for the trainer fit into /dev/shm, through which workers send tensors.

    Where it is full (containers have 64 MiB) a worker's batch is lost, and the trainer would wait for it for ever.
    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except (AttributeError, OSError):  # no such folder, as on macOS and Windows, which do otherwise
        return True
    waiting = config.workers * (config.prefetch + 1) + 1
    free = status.f_bavail * status.f_frsize
    if config.workers == 0 or free >= SHARED_MEMORY_RESERVE * waiting * batch_bytes:
        return True
    note = (
        f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB, and {waiting} batches of {batch_bytes / 2**20:.1f} MiB may wait "
        "for the trainer: they are sent through pipes instead, which is slower (docker run --shm-size=8g, or fewer "
        "data.workers)"
    )
    warnings.warn(note, SharedMemoryWarning, stacklevel=3)
    return False


def _received(batches: Iterator[Batch | ValueError]) -> Iterator[Batch | ValueError]:
    """What the workers send. RuntimeError, worded as torch's own, where one of them is gone while its batch is read."""
    try:
        yield from batches
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if "DataLoader worker" in str(error):  # raised in the worker, and handed on by torch
            raise
        raise RuntimeError(f"DataLoader worker is gone: {error}") from error


def _as_is(batch: Any) -> Any:
    return batch


def _as_arrays(batch: Any) -> Any:
    """With arrays in place of tensors: they go through pipes, and need no shared memory."""
    if isinstance(batch, ValueError):
        return batch
    return {key: value.numpy() if isinstance(value, Tensor) else value for key, value in batch.items()}


def _as_tensors(batch: Any) -> Batch:
    """Undoes `_as_arrays`."""
    return cast(
        Batch,
        {
            key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for key, value in batch.items()
        },
    )


def _start_worker(worker: int) -> None:
    """Leaves signals to the trainer, and the moment the trainer is gone, leaves as well."""
    shield_data_worker(worker)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
