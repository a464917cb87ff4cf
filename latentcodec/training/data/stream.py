"""The endless stream of training crops: batches for one process, read and cropped by its worker processes.

Everything random is a pure function of (seed, position), where `position` counts the samples of the stream from its
very beginning. So there is no state to save: a run resumes by starting its stream at its step, and R ranks with batch
b see what one rank sees with batch R*b. Only `data.streaming` falls short of that: see `sources/remote.py`. Which
images there are is in `images.py`, which one stands where in `order.py`. Shapes: B batch, C channels, H W pixels.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from latentcodec.sources.remote import RemoteSource
from latentcodec.training.data.crops import Batch, Cropping, CropStream, RemoteCropStream
from latentcodec.training.data.images import TrainingImages
from latentcodec.training.data.order import BucketedOrder, EpochOrder, Positions
from latentcodec.training.data.text import find_fonts
from latentcodec.training.progress import counted
from latentcodec.training.signals import held, shield_data_worker

START_CROPS = 64  # for the linear start: more change its PSNR by less than 0.1 dB
START_PARTS = 8  # in which they are read


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
    fonts = tuple(find_fonts(config.text_fonts_left_out)) if config.text_share else ()
    cropping = Cropping(images.seed, config.min_scale, config.flip, config.text_share, fonts)
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


def first_crops(images: TrainingImages) -> list[Tensor]:
    """The first crops [C, H, W] of the stream, of one size, the same in every process."""
    size = START_CROPS // START_PARTS
    parts = training_batches(images, size, accumulation=START_PARTS, steps=1)  # of one step: one shape
    counted_parts = counted(parts, "reading the first crops", START_PARTS, "part")
    return [crop for part in counted_parts for crop in part["pixels"]]


def _order(images: TrainingImages, block: int) -> EpochOrder:
    resolution = images.config.resolution
    if not images.config.buckets:
        return EpochOrder(images.train, resolution, images.seed)
    return BucketedOrder(images.train, images.buckets, resolution, images.seed, block)


def _start_worker(worker: int) -> None:
    """Leaves signals to the trainer, and the moment the trainer is gone, leaves as well."""
    shield_data_worker(worker)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
