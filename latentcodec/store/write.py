"""The bytes of a shard.

A shard is written beside its place, flushed to the disk and renamed, so a kill at any moment leaves a shard whole or
not there. Equal rows give equal bytes: nothing in a file depends on the time, the process or the machine's name.

Shapes: n rows, c latent channels, h w latent cells.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from latentcodec.store.format import (
    CHECKSUM,
    FORMAT,
    METADATA,
    VERSION,
    Settings,
    Shape,
    latent_columns,
    row_checksum,
    shard_schema,
)
from latentcodec.store.quantize import Quantized, as_bytes
from latentcodec.store.shard import KEY

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
