"""One shard of a store: opened without reading it, checked, and its rows as tensors.

The file is mapped into memory, so that a row costs the copy of its bytes and nothing else. What a damaged file says of
itself is checked before anything is believed: columns, types, lengths, offsets, text.

Shapes: n rows, c latent channels, h w latent cells.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latentcodec.files import require_regular
from latentcodec.store.cells import cell_reader
from latentcodec.store.format import (
    CHECKSUM,
    FORMAT,
    METADATA,
    VERSION,
    Settings,
    Shape,
    StoreError,
    latent_columns,
    row_checksum,
    shard_schema,
)
from latentcodec.store.quantize import TORCH, Quantized, dequantize

KEY = b"latentcodec"  # of the JSON in a shard's schema
TEXTS = tuple(name for name, kind in METADATA if kind != pa.int32())  # id, source, caption, label


class Shard:
    """The rows of one file, in memory only as far as they are read."""

    def __init__(self, path: Path, settings: Settings, shape: Shape, rows: int | None = None) -> None:
        """Maps the file. Raises StoreError where it is missing, cut short, or not what it should be."""
        self.path, self.shape, self.dtype = path, shape, settings.dtype
        try:
            require_regular(path)
            with pa.memory_map(os.fsencode(path)) as mapped:  # the mapping outlives the closed file
                reader = pa.ipc.open_file(mapped)
                schema = reader.schema
                if reader.num_record_batches != 1:
                    raise StoreError(f"{path}: {reader.num_record_batches} record batches instead of one")
                self.batch = reader.get_batch(0)
            self.batch.validate(full=True)
        except FileNotFoundError as error:
            raise StoreError(f"{path}: this shard is missing") from error
        except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
            raise StoreError(f"{path}: damaged or cut short ({_first_line(error)})") from error
        wanted = shard_schema(settings, shape)
        if not schema.equals(wanted):
            raise StoreError(f"{path}: its columns are not those of this store")
        if any(self.batch.column(f.name).null_count for f in wanted if not f.nullable):
            raise StoreError(f"{path}: damaged, values are missing")
        if rows is not None and rows != len(self):
            raise StoreError(
                f"{path}: {len(self)} rows, the index says {rows}: pictures were dropped since it was opened, or are "
                "being dropped; open the store again, or run `latentcodec finish`"
            )
        self.about = _about(path, schema.metadata or {})
        if (self.about.get("codec"), self.about.get("shard")) != (settings.codec, int(path.stem)):
            raise StoreError(
                f"{path}: this file is shard {self.about.get('shard')} of a store of the codec "
                f"{self.about.get('codec')}, moved or copied to this place"
            )
        self.columns = [
            c for column in latent_columns(settings, shape) for c in (column.name, column.scale) if c
        ]
        self.names = [column.name for column in latent_columns(settings, shape)]
        self._latents = {name: self._array(name) for name in self.columns}
        self._rows = {name: self._as_stored(self._latents[name]) for name in self.names}
        numbers = [self.batch.column(name).to_numpy() for name, kind in METADATA if kind == pa.int32()]
        self._numbers = np.stack(numbers, 1)  # [n, 6]
        self._texts = {name: cell_reader(self.batch.column(name)) for name in TEXTS}

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def _array(self, name: str) -> np.ndarray:
        """[n, values of a row] of a latent column, a view of the file; bytes as uint8."""
        column = self.batch.column(name)
        if pa.types.is_fixed_size_binary(column.type):
            width = column.type.byte_width
            data = np.frombuffer(column.buffers()[1], dtype=np.uint8)
            return data[column.offset * width :][: len(self) * width].reshape(len(self), width)
        return column.flatten().to_numpy(zero_copy_only=True).reshape(len(self), column.type.list_size)

    def _as_stored(self, flat: np.ndarray) -> np.ndarray:
        """[n, values of a row] -> [n, c, h, w]; numbers that numpy does not have as their b bytes, [n, c, h, w b]."""
        c, h, _ = self.shape
        return flat.reshape(len(self), c, h, flat.shape[1] // (c * h))

    def quantized(self, rows: Sequence[int], name: str = "latent") -> Quantized:
        """The stored values of some rows, [B, c, h, w], and for int8 their scales [B, 2, c]; copies."""
        batch = RowBatch(self, len(rows))
        batch.put(self, range(len(rows)), rows)
        return batch.quantized(name)

    def latents(self, rows: Sequence[int], name: str = "latent") -> Tensor:
        """[B, c, h, w] of some rows as `dequantize` gives them."""
        return dequantize(self.quantized(rows, name))

    def latent(self, row: int, name: str = "latent") -> Tensor:
        """[c, h, w] of one row; the same numbers as `latents`, with less overhead."""
        stored = self._rows[name][row]
        if self.dtype == "int8":
            step, middle = self._latents[f"{name}_scale"][row].reshape(2, -1, 1, 1)
            return torch.from_numpy(stored * step + middle)
        values = torch.from_numpy(stored.copy())
        if self.dtype in ("float16", "float32"):
            return values
        values = values.view(TORCH[self.dtype])
        return values.float() if self.dtype == "float8" else values

    def numbers(self, row: int) -> list[int]:
        """height, width, original height and width, crop top and left."""
        return self._numbers[row].tolist()

    def text(self, row: int, name: str) -> Any:
        """The value of one of the other columns: id, source, caption, label."""
        return self._texts[name](row)

    def pictures(self) -> list[tuple[str, str]]:
        """(source, id) of every row."""
        return list(zip(*(self.batch.column(name).to_pylist() for name in ("source", "id")), strict=True))

    def is_intact(self, row: int) -> bool:
        """Whether a row has the checksum that was stored with it."""
        metadata = {name: self.batch.column(name)[row].as_py() for name, _ in METADATA}
        parts = [memoryview(self._latents[name][row]).cast("B") for name in self.columns]
        return row_checksum(metadata, parts) == self.batch.column(CHECKSUM)[row].as_py()


class RowBatch:
    """Rows of shards of one shape, put together into arrays that are filled in place."""

    def __init__(self, like: Shard, count: int) -> None:
        """Room for `count` rows with the columns of the shard `like`."""
        self.shape, self.dtype = like.shape, like.dtype
        self._latents = {
            name: np.empty((count, column.shape[1]), column.dtype) for name, column in like._latents.items()
        }
        self._numbers = np.empty((count, like._numbers.shape[1]), np.int64)
        self._texts: dict[str, list[Any]] = {name: [None] * count for name in TEXTS}

    def put(self, shard: Shard, positions: Sequence[int], rows: Sequence[int]) -> None:
        """Copies `rows` of a shard to `positions` of the batch."""
        for name, column in shard._latents.items():
            target = self._latents[name]
            for position, row in zip(positions, rows, strict=True):  # np.take takes half as long again
                target[position] = column[row]
        self._numbers[positions] = shard._numbers[rows]
        for name, texts in self._texts.items():
            read = shard._texts[name]
            for position, row in zip(positions, rows, strict=True):
                texts[position] = read(row)

    def quantized(self, name: str) -> Quantized:
        """A latent column as it is stored."""
        values = torch.from_numpy(self._latents[name]).view(TORCH[self.dtype])
        scale = self._latents.get(f"{name}_scale")
        return Quantized(
            values.view(len(values), *self.shape),
            None if scale is None else torch.from_numpy(scale).view(len(values), 2, -1),
        )

    def as_dict(self) -> dict[str, Any]:
        """The batch as `LatentStore.batch` gives it."""
        names = [name for name in self._latents if not name.endswith("_scale")]
        numbers = torch.from_numpy(self._numbers)
        return {
            **{name: dequantize(self.quantized(name)) for name in names},
            "size": numbers[:, 0:2],
            "original_size": numbers[:, 2:4],
            "crop": numbers[:, 4:6],
            **self._texts,
        }


def _about(path: Path, metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """The JSON of a shard's schema: its number, what was left out, what was measured."""
    try:
        about = json.loads(metadata[KEY])
        if (about["format"], about["version"]) != (FORMAT, VERSION):
            raise StoreError(
                f"{path}: format version {about['version']}, this package reads version {VERSION}"
            )
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path}: no shard of a latent store, or damaged") from error
    return about


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def as_datasets(shards: Iterable[Shard]) -> Any:
    """A `datasets.Dataset` over mapped shards; where there are several shapes a DatasetDict, by `16x32x32`."""
    import datasets
    from datasets.table import ConcatenationTable, InMemoryTable

    by_shape: dict[Shape, list[Any]] = {}
    for shard in shards:
        table = pa.Table.from_batches([shard.batch]).replace_schema_metadata(None)
        by_shape.setdefault(shard.shape, []).append(InMemoryTable(table))  # a view: the shard is mapped
    sets = {
        "x".join(map(str, shape)): datasets.Dataset(ConcatenationTable.from_tables(tables))
        for shape, tables in by_shape.items()
    }
    return next(iter(sets.values())) if len(sets) == 1 else datasets.DatasetDict(sets)
