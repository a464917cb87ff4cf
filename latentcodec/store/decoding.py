"""The pictures of a plan, read and decoded in worker processes, batch by batch, in the order of the plan.

Shapes: C channels, H W pixels, c latent channels, h w latent cells.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentcodec.pixels import UnreadableImage
from latentcodec.printable import existing
from latentcodec.store.caches import read_cache
from latentcodec.store.faults import only_faults_of
from latentcodec.store.format import Settings
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
    for (shard, start, stop), pictures in zip(jobs, loader, strict=True):
        if isinstance(pictures, OSError):
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
    """The batches (shard, first, last + 1) by number."""

    def __init__(self, plan: Plan, jobs: list[tuple[int, int, int]]) -> None:
        self.plan, self.jobs = plan, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> list[Decoded] | OSError:
        try:
            return decode_pictures(self.plan, *self.jobs[number])
        except OSError as error:  # handed over as it is: torch would put a worker's traceback into its words
            return error


def decode_pictures(plan: Plan, shard: int, start: int, stop: int) -> list[Decoded]:
    """The pictures number `start` to `stop` - 1 of a shard."""
    reader = EntryReader(Columns(**plan.part(shard).about["columns"]), plan.settings.captions is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # what is stored must not depend on a filter that makes them errors
        return [decode(picture, reader, plan.settings) for picture in plan.pictures(shard, start, stop)]


def decode(picture: Planned, reader: EntryReader, settings: Settings) -> Decoded:
    """Reads one picture; one that cannot be read has a `reason`. Raises OSError where its file is not at fault."""
    try:
        with only_faults_of(picture.entry):
            return _read(picture, reader, settings)
    except UnreadableImage as error:
        return Decoded(picture, reason=str(error))


def _read(picture: Planned, reader: EntryReader, settings: Settings) -> Decoded:
    entry = picture.entry
    if entry.kind == CACHE:
        cached = read_cache(existing(entry.path))
        caption, label = reader.caption_and_label(entry)
        return Decoded(picture, None, cached.latent, cached.original or (0, 0), cached.crop, caption, label)
    pixels = read_pixels(reader.picture(entry), entry.path, settings, picture.expected)
    caption, label = reader.caption_and_label(entry)
    return Decoded(picture, pixels, None, pixels.original, pixels.crop, caption, label)


def _as_it_is(pictures: list[Decoded] | OSError) -> list[Decoded] | OSError:
    return pictures
