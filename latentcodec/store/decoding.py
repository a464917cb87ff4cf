"""The pictures of a plan, read and decoded in worker processes, batch by batch, in the order of the plan.

Shapes: C channels, H W pixels, c latent channels, h w latent cells.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentcodec.pixels import UnreadableImage
from latentcodec.printable import existing
from latentcodec.store.caches import read_cache
from latentcodec.store.faults import only_faults_of
from latentcodec.store.format import Settings, Shape
from latentcodec.store.items import CACHE, Columns, EntryReader
from latentcodec.store.picture import Pixels, read_pixels
from latentcodec.store.plan import Plan, Planned

BATCHES_AHEAD = 2  # that each worker keeps ready


class Decoded(NamedTuple):
    """One picture as a worker hands it over: pixels, or the latent of another program's cache, or a reason."""

    planned: Planned
    pixels: Pixels | None = None
    latent: Tensor | None = None
    """[c, h, w] as in the cache's file."""
    original: tuple[int, int] = (0, 0)
    """H, W of the picture before it was resized."""
    crop: tuple[int, int] = (0, 0)
    caption: str | None = None
    label: int | None = None
    reason: str | None = None
    """Why it is left out; None where it is not."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent as arrays, which go through the worker's pipe.

        torch sends a tensor through /dev/shm, where a full one (containers have 64 MiB) loses the batch in silence, and
        takes an open file for each, of which a process may have 1,024.
        """
        pixels = None if self.pixels is None else (self.pixels.x.numpy(), *self.pixels[1:])
        latent = None if self.latent is None else self.latent.numpy()
        return _received, (self.planned, pixels, latent, *self[3:])


def _received(
    planned: Planned, pixels: tuple[Any, ...] | None, latent: np.ndarray | None, *others: Any
) -> Decoded:
    """A picture as it was before it was sent."""
    x = None if pixels is None else Pixels(torch.from_numpy(pixels[0]), *pixels[1:])
    return Decoded(planned, x, None if latent is None else torch.from_numpy(latent), *others)


class DecodedBatch(NamedTuple):
    """What is encoded at once."""

    shard: int
    is_first: bool
    is_last: bool
    pictures: list[Decoded]


def decoded_batches(plan: Plan, shards: list[int], workers: int) -> Iterator[DecodedBatch]:
    """The batches of some shards, in order, decoded ahead by `workers` processes (0: by this one, when asked)."""
    jobs = []
    for shard in shards:
        size, count = plan.batch(shard), plan.rows(shard)
        jobs += [(shard, start, min(start + size, count)) for start in range(0, count, size)]
    loader = DataLoader(
        _Batches(plan, jobs),
        batch_size=None,
        num_workers=min(workers, len(jobs)),
        prefetch_factor=BATCHES_AHEAD if workers and jobs else None,
        collate_fn=_as_it_is,
    )
    batches = iter(loader)
    for shard, start, stop in jobs:
        pictures = next(batches)
        if isinstance(pictures, Exception):
            del batches  # which ends the workers: an error would hold them, and torch waits for each
            raise pictures
        yield DecodedBatch(shard, start == 0, stop == plan.rows(shard), pictures)


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Raises ChildProcessError where a worker was killed, in place of what torch says of it, whenever it says so."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            errno.ECHILD,
            "a process that decodes pictures was ended from outside, as systems do that are short of memory: use fewer "
            "--workers; the same command goes on",
        ) from error


class _Batches(Dataset):
    """The batches (shard, first, last + 1) by number.

    An error that is told in a line is given instead of raised: what a worker raises comes inside its traceback.
    """

    def __init__(self, plan: Plan, jobs: list[tuple[int, int, int]]) -> None:
        self.plan, self.jobs = plan, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> list[Decoded] | ValueError | OSError:
        try:
            return decode_pictures(self.plan, *self.jobs[number])
        except (ValueError, OSError) as error:
            return error


def decode_pictures(plan: Plan, shard: int, start: int, stop: int) -> list[Decoded]:
    """The pictures number `start` to `stop` - 1 of a shard."""
    reader = EntryReader(Columns(**plan.part(shard).about["columns"]), plan.settings.captions is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # what is stored must not depend on a filter that makes them errors
        pictures, shape = plan.pictures(shard, start, stop), plan.shape(shard)
        return [decode(picture, reader, plan.settings, shape) for picture in pictures]


def decode(picture: Planned, reader: EntryReader, settings: Settings, shape: Shape) -> Decoded:
    """Reads one picture of a shard whose latents have this shape; one that cannot be read has a `reason`.

    Raises OSError where its file is not at fault.
    """
    try:
        with only_faults_of(picture.entry):
            return _read(picture, reader, settings, shape)
    except UnreadableImage as error:
        return Decoded(picture, reason=str(error))


def _read(picture: Planned, reader: EntryReader, settings: Settings, shape: Shape) -> Decoded:
    entry = picture.entry
    if entry.kind == CACHE:
        cached = read_cache(existing(entry.path))
        if (found := tuple(cached.latent.shape)) != shape:
            raise UnreadableImage(
                f"{entry.path}: a latent {found}, {shape} is what this store was planned for"
            )
        caption, label = reader.caption_and_label(entry)
        return Decoded(picture, None, cached.latent, cached.original or (0, 0), cached.crop, caption, label)
    pixels = read_pixels(reader.picture(entry), entry.path, settings, picture.expected, shape)
    caption, label = reader.caption_and_label(entry)
    return Decoded(picture, pixels, None, pixels.original, pixels.crop, caption, label)


def _as_it_is(batch: Any) -> Any:
    return batch
