"""The plan of a store: which picture belongs to which shard, fixed before the first is encoded.

Whoever encodes shard 17, in whichever process, on whichever day, reads in the plan which pictures it holds, in which
batches and in which precision; so the result does not depend on who did which shard, nor on what was killed in between.
A plan has parts, one for each time that pictures were added; a part is one Arrow file.

Shapes: c latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from latentcodec.files import require_regular
from latentcodec.store.format import FORMAT, VERSION, Settings, Shape, StoreError, shard_file
from latentcodec.store.items import Columns, Entry

PLAN_FOLDER = "plan"
PART_FILE = re.compile(r"[0-9]+\.arrow")
KEY = b"latentcodec"
COLUMNS = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("id", "source", "kind")),
        *(pa.field(name, pa.int64()) for name in ("offset", "length", "caption_offset", "caption_length")),
        pa.field("height", pa.int32()),  # of the upright picture, from its header; -1 where it was not read
        pa.field("width", pa.int32()),
        pa.field("reason", pa.string()),  # why it is left out; null where it is not
    ]
)


class Planned(NamedTuple):
    """One picture of a shard."""

    entry: Entry
    expected: tuple[int, int] | None
    """H, W that its header gave; None where it was not read."""
    is_sampled: bool
    """Whether it is decoded again to measure what storing it costs."""


@dataclass
class Part:
    """The pictures that were added at once."""

    table: pa.Table
    about: dict[str, Any]
    """As in the file's schema: settings, sources, columns, machine, first, shards, samples."""

    @property
    def machine(self) -> dict[str, Any]:
        """How this part is encoded: device, precision, batch, threads, torch, functions."""
        return self.about["machine"]

    @property
    def first(self) -> int:
        """Number of its first shard."""
        return self.about["first"]

    @property
    def rows(self) -> int:
        """Pictures of its shards, which come first in the table; behind them are those that were left out."""
        return sum(count for *_, count in self.about["shards"])

    def asks_for_the_same_as(self, other: Part) -> bool:
        """Whether both plan the same pictures in the same way, on whatever machine."""
        ours, theirs = (
            {key: value for key, value in part.about.items() if key not in ("machine", "digest")}
            for part in (self, other)
        )
        return ours == theirs and self.table.equals(other.table)

    def to_bytes(self) -> bytes:
        """The file of this part; equal parts have equal bytes."""
        text = json.dumps(self.about, sort_keys=True, allow_nan=False)
        sink = pa.BufferOutputStream()
        table = self.table.replace_schema_metadata({KEY: text.encode()}).combine_chunks()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    @classmethod
    def load(cls, path: Path) -> Part:
        """Maps the file. Raises StoreError where it is damaged or of another version."""
        try:
            require_regular(path)
            with pa.memory_map(os.fsencode(path)) as mapped:
                table = pa.ipc.open_file(mapped).read_all()
            table.validate(full=True)
            about = json.loads((table.schema.metadata or {})[KEY])
            if (about["format"], about["version"]) != (FORMAT, VERSION):
                raise StoreError(
                    f"{path}: a plan of version {about['version']}, this package reads {VERSION}"
                )
            if not table.schema.remove_metadata().equals(COLUMNS):
                raise StoreError(f"{path}: damaged, its columns are not those of a plan")
            rows = sum(count for *_, count in about["shards"])
            if about["digest"] != plan_digest(about, table) or rows > len(table):
                raise StoreError(f"{path}: damaged, its digest does not fit its content")
            Settings(**about["settings"])
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}") from error
        except (pa.ArrowException, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise StoreError(f"{path}: this plan is damaged or cut short ({reason})") from error
        return cls(table, about)


class Plan:
    """All parts of a store's plan, seen as one list of shards."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.settings = Settings(**parts[0].about["settings"])
        self.normalisation: dict[str, Any] = parts[0].about["normalisation"]
        self._shapes: list[Shape] = []
        self._places: list[tuple[Part, int, int]] = []  # part, first row, rows
        for part in parts:
            row = 0
            for c, h, w, count in part.about["shards"]:
                self._shapes.append((c, h, w))
                self._places.append((part, row, count))
                row += count

    @staticmethod
    def files(store: Path) -> list[Path]:
        """The files of its parts, in their order. Raises StoreError where the folder cannot be read."""
        folder = store / PLAN_FOLDER
        try:
            return sorted(file for file in folder.iterdir() if PART_FILE.fullmatch(file.name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreError(f"{folder}: {error.strerror}") from error

    @classmethod
    def load(cls, store: Path) -> Plan:
        """The plan of a store. Raises StoreError where there is none, or a part is damaged or missing."""
        files = cls.files(store)
        if not files:
            raise StoreError(f"{store}: holds no plan of an encoding")
        if [file.stem for file in files] != [f"{number:04}" for number in range(len(files))]:
            raise StoreError(f"{store / PLAN_FOLDER}: a part of the plan is missing")
        parts: list[Part] = []
        for file in files:
            part, shards = Part.load(file), sum(len(before.about["shards"]) for before in parts)
            if part.first != shards or (parts and part.about["settings"] != parts[0].about["settings"]):
                raise StoreError(
                    f"{file}: begins with shard {part.first}, not {shards}, or is of another store"
                )
            parts.append(part)
        return cls(parts)

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(len(self._places))

    def shape(self, shard: int) -> Shape:
        """c, h, w of a shard's latents."""
        return self._shapes[shard]

    def file(self, shard: int) -> str:
        """A shard's path within the store."""
        return shard_file(self._shapes[shard], shard)

    def part(self, shard: int) -> Part:
        """The part that a shard belongs to."""
        return self._places[shard][0]

    def rows(self, shard: int) -> int:
        """Pictures of a shard."""
        return self._places[shard][2]

    def batch(self, shard: int) -> int:
        """Pictures that are encoded at once."""
        machine = self.part(shard).machine
        if machine["batch"]:
            return machine["batch"]
        _, h, w = self.shape(shard)
        return max(1, min(64, machine["batch_pixels"] // (h * w * self.settings.downsampling_factor**2)))

    def pictures(self, shard: int, start: int, stop: int) -> list[Planned]:
        """The pictures number `start` to `stop` - 1 of a shard."""
        part, first, _ = self._places[shard]
        samples = set(part.about["samples"])
        rows = part.table.slice(first + start, stop - start).to_pylist()
        return [
            Planned(
                _entry(row), None if row["height"] < 0 else (row["height"], row["width"]), number in samples
            )
            for number, row in enumerate(rows, first + start)
        ]

    def rejects(self) -> list[dict[str, str]]:
        """Pictures that were left out before any was encoded and are in no later part, as rejects.jsonl lists them."""
        found: dict[str, dict[str, str]] = {}
        for part in self.parts:
            for path in _as_listed(part, 0, part.rows) if found else ():
                found.pop(path, None)
            left_out = part.table.slice(part.rows).to_pylist()
            lines = [{"path": _entry(row).path, "reason": row["reason"]} for row in left_out]
            found |= zip(_as_listed(part, part.rows), lines, strict=True)
        return list(found.values())

    def accepted(self) -> set[str]:
        """The path of every picture of a shard, as `list_entries` has it."""
        return {path for part in self.parts for path in _as_listed(part, 0, part.rows)}

    def left_out(self) -> set[str]:
        """The path of every picture that a part has left out before any was encoded."""
        return {path for part in self.parts for path in _as_listed(part, part.rows)}

    def find(self, names: Iterable[str]) -> dict[str, set[tuple[str, str]]]:
        """name -> (source, id) of each picture with this id, or this `source/id`."""
        wanted = set(names)
        found: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for part in self.parts:
            for source, name in _texts(part.table, "source", "id"):
                for spelling in {name, f"{source}/{name}"} & wanted:
                    found[spelling].add((source, name))
        return dict(found)


def _as_listed(part: Part, start: int, stop: int | None = None) -> Iterator[str]:
    """The paths of the rows `start` to `stop` - 1, as a listing of today has them.

    Earlier ones filled the numbers of a data set's rows up with zeros, and did not name its split.
    """
    columns = Columns(**part.about["columns"])
    table = part.table.slice(start, None if stop is None else stop - start)
    for source, name, kind in _texts(table, "source", "id", "kind"):
        if kind == "row":
            source, name = columns.source(columns.name(source)), f"row {int(name.removeprefix('row '))}"
        yield Entry(name, source, kind).path


def _texts(table: pa.Table, *names: str) -> Iterator[tuple[str, ...]]:
    """Some columns, row by row."""
    for batch in table.select(names).to_batches():
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _entry(row: dict[str, Any]) -> Entry:
    return Entry(**{name: row[name] for name in Entry._fields})


def plan_digest(about: dict[str, Any], table: pa.Table) -> str:
    """sha256 of what the plan says, whatever the Arrow version wrote it."""
    digest = hashlib.sha256()
    digest.update(json.dumps({k: v for k, v in about.items() if k != "digest"}, sort_keys=True).encode())
    for batch in table.select(COLUMNS.names).to_batches(max_chunksize=65536):
        digest.update(json.dumps([column.to_pylist() for column in batch.columns]).encode())
    return digest.hexdigest()
