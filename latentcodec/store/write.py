"""Writing a store: a shard's bytes, files that appear whole and durable, the index, and rows that are taken out.

A shard is written beside its place, flushed to the disk and renamed, so a kill at any moment leaves a shard whole or
not there. Equal rows give equal bytes: nothing in a file depends on the time, the process or the machine's name.

Shapes: n rows, c latent channels, h w latent cells.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa

from latentcodec.files import read_regular, write_whole
from latentcodec.leftovers import ENDING, is_leftover
from latentcodec.store.format import (
    CHECKSUM,
    DROPPED,
    FORMAT,
    INDEX,
    METADATA,
    REJECTS,
    VERSION,
    Index,
    Settings,
    Shape,
    ShardEntry,
    StoreError,
    latent_columns,
    row_checksum,
    shard_schema,
)
from latentcodec.store.locks import remove_stale_locks
from latentcodec.store.plan import Plan
from latentcodec.store.quantize import Quantized, as_bytes
from latentcodec.store.shard import KEY, Shard
from latentcodec.store.verification import checked_entry

Row = dict[str, Any]  # the columns of `METADATA`


def shard_batch(
    settings: Settings, shape: Shape, rows: Sequence[Row], latents: dict[str, Quantized]
) -> pa.RecordBatch:
    """The record batch of a shard: its rows with their latents, each [n, c, h, w], and the checksums."""
    schema = shard_schema(settings, shape)
    columns: dict[str, pa.Array] = {
        name: pa.array([row[name] for row in rows], kind) for name, kind in METADATA
    }
    parts: list[np.ndarray] = []  # [n, bytes] of each latent column
    for column in latent_columns(settings, shape):
        values, scale = latents[column.name]
        parts.append(as_bytes(values))
        columns[column.name] = _column(parts[-1], schema.field(column.name).type)
        if column.scale:
            assert scale is not None
            parts.append(as_bytes(scale))
            columns[column.scale] = _column(parts[-1], schema.field(column.scale).type)
    checksums = [row_checksum(row, [part[i].data for part in parts]) for i, row in enumerate(rows)]
    columns[CHECKSUM] = pa.array(checksums, pa.uint64())
    return pa.record_batch([columns[field.name] for field in schema], schema=schema)


def _column(content: np.ndarray, kind: pa.DataType) -> pa.Array:
    """[n, bytes] as a column of fixed-size lists, or of fixed-size bytes."""
    buffer = pa.py_buffer(np.ascontiguousarray(content))
    if pa.types.is_fixed_size_binary(kind):
        return pa.FixedSizeBinaryArray.from_buffers(kind, len(content), [None, buffer])
    values = pa.Array.from_buffers(kind.value_type, len(content) * kind.list_size, [None, buffer])
    return pa.FixedSizeListArray.from_arrays(values, type=kind)


def shard_bytes(batch: pa.RecordBatch, about: dict[str, Any]) -> bytes:
    """The file of a shard; `about`: its number, what was left out, what was measured."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **about}, sort_keys=True, allow_nan=False)
    schema = batch.schema.with_metadata({KEY: text.encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch.cast(schema) if not batch.schema.equals(schema) else batch)
    return sink.getvalue().to_pybytes()


def finish(
    store: str | Path, drop: Iterable[str] = (), progress: Callable[[int, int], None] | None = None
) -> Index:
    """Checks every shard that has no digest yet, takes out dropped rows, and writes the index.

    `drop`: ids of pictures (or `source/id`, where two sources have the same id) to be removed for good; they are not
    encoded again. `progress(done, shards)` is called after each shard. Raises StoreError naming what is missing,
    damaged, or not in the store.
    """
    store = Path(store)
    plan = Plan.load(store)
    missing = [number for number in plan.shards if not (store / plan.file(number)).is_file()]
    if missing:
        raise StoreError(
            f"{store}: {len(missing)} of {len(plan.shards)} shards are missing, the first is "
            f"{plan.file(missing[0])}: run the same `latentcodec encode` again"
        )
    dropped = _record_drops(store, plan, list(drop))
    known = _known_entries(store)
    entries, rejects, samples = [], plan.rejects(), []
    for number, shard in _finished_shards(store, plan, dropped):
        entry = known.get(plan.file(number))
        if entry is None or entry.bytes != shard.path.stat().st_size or entry.items != len(shard):
            _require_planned(plan, number, shard, dropped)
            entry = checked_entry(store, shard)
        entries.append(entry)
        rejects += shard.about["rejects"]
        samples += shard.about["samples"]
        if progress is not None:
            progress(len(entries), len(plan.shards))
    index = Index(
        plan.settings, plan.normalisation, entries, len(rejects), sorted(dropped),
        _summary(samples), [part.machine for part in plan.parts],
    )  # fmt: skip
    lines = "".join(json.dumps(reject, sort_keys=True) + "\n" for reject in rejects)
    write_whole(store / REJECTS, lines.encode())
    write_whole(store / INDEX, index.to_json())
    _clear_litter(store)
    return index


def _clear_litter(store: Path) -> None:
    """Removes what processes left that were killed while they wrote, and their locks; those at work keep theirs."""
    for folder, folders, files in os.walk(store):  # which forgives what vanishes meanwhile
        for path in (Path(folder, name) for name in (*folders, *files) if name.startswith(".")):
            if path.suffix != ENDING or not is_leftover(path):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    remove_stale_locks(store)


def _finished_shards(store: Path, plan: Plan, dropped: set[str]) -> Iterable[tuple[int, Shard]]:
    """Every shard, opened; those that hold a dropped row are written anew without it."""
    wanted = {key.split("\t")[1] for key in dropped}
    for number in plan.shards:
        path = store / plan.file(number)
        shard = Shard(path, plan.settings, plan.shape(number))
        if wanted and wanted & set(shard.batch.column("id").to_pylist()):
            keys = [
                f"{s}\t{i}"
                for s, i in zip(*(shard.batch.column(n).to_pylist() for n in ("source", "id")), strict=True)
            ]
            kept = [row for row, key in enumerate(keys) if key not in dropped]
            if len(kept) < len(shard):
                about = {k: v for k, v in shard.about.items() if k not in ("format", "version")}
                write_whole(path, shard_bytes(shard.batch.take(pa.array(kept, pa.int64())), about))
                shard = Shard(path, plan.settings, plan.shape(number))
        yield number, shard


def _require_planned(plan: Plan, number: int, shard: Shard, dropped: set[str]) -> None:
    """Raises StoreError where a shard holds, with what it left out, other pictures than the plan gave it."""
    planned = [picture.entry for picture in plan.pictures(number, 0, plan.rows(number))]
    left_out = {reject["path"] for reject in shard.about["rejects"]}
    wanted = [(entry.source, entry.id) for entry in planned
              if entry.path not in left_out and f"{entry.source}\t{entry.id}" not in dropped]  # fmt: skip
    held = zip(*(shard.batch.column(name).to_pylist() for name in ("source", "id")), strict=True)
    if list(held) != wanted:
        raise StoreError(
            f"{shard.path}: holds other pictures than the plan gave this shard, as one of another store does; delete "
            "it and run the same `latentcodec encode` again"
        )


def _record_drops(store: Path, plan: Plan, drop: list[str]) -> set[str]:
    """`source` and `id` of all dropped pictures; new ones are on the disk before any shard is touched."""
    path = store / DROPPED
    dropped = _read_drops(path) if path.is_file() else set()
    if drop:
        found = plan.find(drop)
        for name in drop:
            if name not in found:
                raise StoreError(f"{store}: no picture {name!r} in this store (--drop)")
        dropped |= {key for keys in found.values() for key in keys}
        write_whole(path, (json.dumps(sorted(dropped), indent=1) + "\n").encode())
    return dropped


def _read_drops(path: Path) -> set[str]:
    try:
        keys = json.loads(read_regular(path))
        if not isinstance(keys, list) or not all(isinstance(key, str) and "\t" in key for key in keys):
            raise ValueError("no list of sources and ids")
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path}: damaged ({error}); bring it back from a copy, or delete it and name the pictures again (--drop)"
        ) from error
    return set(keys)


def _known_entries(store: Path) -> dict[str, ShardEntry]:
    """The entries of the index that is there, by file."""
    try:
        return {entry.file: entry for entry in Index.load(store).shards}
    except StoreError:
        return {}


def _summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over the sampled pictures, dB."""
    if not samples:
        return {}
    stored, exact = (fmean(s[name] for s in samples) for name in ("psnr", "psnr_before_rounding"))
    return {
        "pictures": len(samples),
        "psnr": round(stored, 4),
        "psnr_before_rounding": round(exact, 4),
        "loss": round(exact - stored, 4),
        "lowest": min(({"psnr": s["psnr"], "path": s["path"]} for s in samples), key=lambda s: s["psnr"]),
    }
