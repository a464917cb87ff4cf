"""Making a plan: the pictures are listed, their headers read where the size decides the shard, and cut into shards.

Shapes: c latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from latentcodec.pixels import UnreadableImage, image_size
from latentcodec.printable import existing
from latentcodec.store.caches import read_cache
from latentcodec.store.faults import only_faults_of
from latentcodec.store.format import FORMAT, VERSION, Settings, Shape, row_bytes
from latentcodec.store.items import CACHE, Columns, Entry, EntryReader
from latentcodec.store.listing import Listed, list_caches, list_entries
from latentcodec.store.picture import planned_shape
from latentcodec.store.plan import COLUMNS, Part, Plan, plan_digest

SHARD_BYTES = 512 << 20  # of latents in a shard, of which a process holds several copies while it writes
HEADER_READERS = 8  # threads that read the headers of pictures


def make_plan(
    sources: Sequence[str],
    settings: Settings,
    machine: dict[str, Any],
    columns: Columns = Columns(),  # noqa: B008 - immutable
    shard_size: int = 1024,
    sampled: int = 16,
    normalisation: dict[str, Any] | None = None,
    before: Plan | None = None,
) -> Plan:
    """A plan for the pictures of `sources` that the plan `before` does not have yet, as one more part of it.

    Those that it left out are tried again. Where nothing is new, it is `before` itself. `sampled` pictures, evenly
    spread, are decoded again while encoding. Raises ValueError where there is nothing to read, and OSError where a
    source goes meanwhile.
    """
    listed = list_caches(sources) if settings.imported else list_entries(sources, columns)
    if before is None:
        _refuse_columns(listed, columns)
    accepted = before.accepted() if before else set()
    listed = [item for item in listed if item.entry.path not in accepted]
    entries, sizes = _without_known_rejects(
        listed, _sizes(listed, settings, columns), before.left_out() if before else set()
    )
    if before is not None and not entries:
        return before
    shards, order, reasons = _cut(entries, sizes, settings, shard_size)
    rows = sum(count for *_, count in shards)
    samples = np.unique(np.linspace(0, rows - 1, min(sampled, rows)).round().astype(int)).tolist()
    about = {
        "format": FORMAT,
        "version": VERSION,
        "settings": asdict(settings),
        "normalisation": normalisation or {},
        "sources": list(sources),
        "columns": columns._asdict(),
        "machine": machine,
        "first": len(before.shards) if before else 0,
        "shards": shards,
        "samples": samples,
    }
    table = _table(entries, sizes, reasons, order)
    about["digest"] = plan_digest(about, table)
    return Plan([*(before.parts if before else []), Part(table, about)])


def _refuse_columns(listed: list[Listed], columns: Columns) -> None:
    """Raises ValueError for the column of a data set where none of the pictures of a new store is of one."""
    if any(entry.kind == "row" and reason is None for entry, reason in listed):
        return
    for name, column in (("caption", columns.caption), ("label", columns.label)):
        if column is not None:
            raise ValueError(
                f"--{name}-column {column}: there are no columns in image and tar files, and no source is a data set; "
                "leave it out"
            )


def _sizes(listed: list[Listed], settings: Settings, columns: Columns) -> list[tuple[int, int] | str | None]:
    """H, W of each picture from its header, or why it is left out; None throughout where one size is for all."""
    if settings.size is not None:
        return [item.reason for item in listed]
    reader = EntryReader(columns, with_captions=False)
    f = settings.downsampling_factor

    def size(item: Listed) -> tuple[int, int] | str:
        entry, reason = item
        if reason is not None:
            return reason
        try:
            with only_faults_of(entry):
                if entry.kind == CACHE:
                    c, h, w = read_cache(existing(entry.path)).latent.shape
                    if c != (channels := settings.latent_channels):
                        raise UnreadableImage(
                            f"{entry.path}: a latent {(c, h, w)}, those of this codec have {channels} channels"
                        )
                    return h * f, w * f
                return image_size(reader.picture(entry), name=entry.path)
        except UnreadableImage as error:
            return str(error)

    with warnings.catch_warnings(), ThreadPoolExecutor(HEADER_READERS) as pool:
        warnings.simplefilter("default")  # the plan must not depend on a filter that makes them errors
        return list(pool.map(size, listed))


def _without_known_rejects(
    listed: list[Listed], sizes: list[tuple[int, int] | str | None], left_out: set[str]
) -> tuple[list[Entry], list[tuple[int, int] | str | None]]:
    """Entries and sizes without what was `left_out` before, by path, and still has a reason to be."""
    kept = [
        (item.entry, size)
        for item, size in zip(listed, sizes, strict=True)
        if not isinstance(size, str) or item.entry.path not in left_out
    ]
    return [entry for entry, _ in kept], [size for _, size in kept]


def _cut(
    entries: list[Entry], sizes: list[tuple[int, int] | str | None], settings: Settings, shard_size: int
) -> tuple[list[list[int]], list[int], list[str | None]]:
    """The shards as [c, h, w, rows], the entries' numbers in the order of the plan, and why an entry is left out.

    A shard has `shard_size` pictures at most, and `SHARD_BYTES` of latents, or one picture.
    """
    groups: dict[Shape, list[int]] = defaultdict(list)
    reasons: list[str | None] = [None] * len(entries)
    left_out = []
    for number, size in enumerate(sizes):
        if isinstance(size, str):
            reasons[number] = size
            left_out.append(number)
        else:
            groups[planned_shape(size, settings)].append(number)
    shards, order = [], []
    for shape, members in sorted(groups.items()):
        most = max(1, min(shard_size, SHARD_BYTES // row_bytes(settings, shape)))
        for start in range(0, len(members), most):
            shards.append([*shape, len(members[start : start + most])])
        order += members
    return shards, order + left_out, reasons


def _table(
    entries: list[Entry],
    sizes: list[tuple[int, int] | str | None],
    reasons: list[str | None],
    order: list[int],
) -> pa.Table:
    """The rows of a part, in the order of the plan."""
    known = [size if isinstance(size, tuple) else (-1, -1) for size in sizes]
    values: dict[str, list[Any]] = {
        **{name: [entries[i][k] for i in order] for k, name in enumerate(Entry._fields)},
        "height": [known[i][0] for i in order],
        "width": [known[i][1] for i in order],
        "reason": [reasons[i] for i in order],
    }
    return pa.table({field.name: pa.array(values[field.name], field.type) for field in COLUMNS})
