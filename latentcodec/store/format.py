"""The format of a store: the names of its files, the columns of a shard, the index and the checksums.

    STORE/index.json                          counts, digests and settings: what makes a folder a finished store
    STORE/plan/0000.arrow                     which picture belongs to which shard; 0001.arrow ...: added later
    STORE/shards/16x32x32/000000.arrow        Arrow IPC files, all latents of a shard of one shape c x h x w
    STORE/codec/                              the codec, an ordinary diffusers folder
    STORE/rejects.jsonl                       pictures that were left out: {"path", "reason"}, and the "shard"
    STORE/dropped.json                        pictures that were removed, where there are any

docs/store.md is the same for readers without this package. Writing is in `write.py`, reading in `read.py`, the number
formats in `quantize.py`.

Shapes: c latent channels, h w latent cells, H W pixels, n rows of a shard.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash

from latentcodec.files import read_regular

FORMAT = "latentcodec store"
VERSION = 1
INDEX, CODEC, REJECTS, DROPPED = "index.json", "codec", "rejects.jsonl", "dropped.json"
LOCKS = ".encoding"  # one file for each process at work
Shape = tuple[int, int, int]  # c, h, w

STORED = {  # dtype of the latents -> Arrow type of one value; None: bytes, for which Arrow has no number type
    "float32": pa.float32(),
    "float16": pa.float16(),
    "int8": pa.int8(),
    "bfloat16": None,
    "float8": None,
}
ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1, "bfloat16": 2, "float8": 1}
METADATA = (  # the columns of a row that are not latents, in the order in which they are stored and checksummed
    ("id", pa.string()),
    ("source", pa.string()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("original_height", pa.int32()),
    ("original_width", pa.int32()),
    ("crop_top", pa.int32()),
    ("crop_left", pa.int32()),
    ("caption", pa.string()),
    ("label", pa.int64()),
)
CHECKSUM = "checksum"
MIRRORED = {"latent": "mirrored", "std": "mirrored_std"}  # a latent column -> that of the mirrored picture


class StoreError(ValueError):
    """A store that cannot be read, or not as it was asked; the message names the file and what to do."""


@dataclass(frozen=True)
class Settings:
    """What decides the content of a store. Pictures can be added to a store with equal settings only."""

    codec: str
    """Fingerprint of the codec."""
    latent_channels: int
    downsampling_factor: int
    image_channels: int = 3
    size: int | None = None
    """Side in pixels of the square centre that is encoded, after the shorter side was scaled to it."""
    area: int | None = None
    """Pixels of a bucket: sides are multiples of `multiple`, the aspect ratio the nearest to the picture's."""
    multiple: int | None = None
    min_side: int = 0
    """Pictures with a shorter side below this many pixels are left out."""
    dtype: str = "float16"
    """Of the stored latents: float32, float16, bfloat16, int8 or float8 (e4m3)."""
    posterior: str = "mode"
    """`mode`: the mean alone; `mean and std`: both, from which training draws."""
    mirrored: bool = False
    """Whether the latents of the mirrored picture are stored too."""
    captions: str | None = None
    """`txt`: the text file beside each picture; else the column of a data set."""
    label: str | None = None
    """Column of a data set with whole numbers."""
    imported: str | None = None
    """For latents of another program's cache, how they stood there: `raw` or `normalised`."""

    def differences(self, other: Settings) -> list[str]:
        """`name: value, not other's value` for each setting that differs."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [f"{name} {mine!r}, not {theirs!r}" for name, mine, theirs in pairs if mine != theirs]


@dataclass(frozen=True)
class ShardEntry:
    """What the index says of one shard."""

    file: str
    """Path within the store."""
    items: int
    shape: Shape
    bytes: int
    sha256: str


@dataclass
class Index:
    """The content of index.json."""

    settings: Settings
    normalisation: dict[str, Any]
    """`mean` and `std` per channel: z = (raw - mean) / std."""
    shards: list[ShardEntry]
    rejected: int
    """Pictures that were left out, as listed in rejects.jsonl."""
    dropped: list[str]
    """`source` and `id` of the pictures that were removed, joined by a tab."""
    samples: dict[str, Any] = field(default_factory=dict)
    """What was measured on a sample of the pictures: `pictures`, `psnr`, `psnr_before_rounding`, `loss` in dB, and
    the picture with the `lowest`."""
    machine: list[dict[str, Any]] = field(default_factory=list)
    """How each part of the plan was encoded: device, precision, batch, threads."""

    @property
    def items(self) -> int:
        """Rows of all shards."""
        return sum(shard.items for shard in self.shards)

    @property
    def bits_per_value(self) -> float:
        """Bits that one number of a latent takes, the scales of int8 counted in."""
        cells = [shard.items * shard.shape[1] * shard.shape[2] for shard in self.shards]
        if self.settings.dtype != "int8" or not sum(cells):
            return 8.0 * ITEM_BYTES[self.settings.dtype]
        return 8.0 + 64.0 * self.items / sum(cells)  # two float32 for each picture and channel

    @property
    def bytes_per_picture(self) -> float:
        """Bytes on the disk, metadata counted in, divided by the rows."""
        return sum(shard.bytes for shard in self.shards) / max(1, self.items)

    @cached_property
    def digest(self) -> str:
        """sha256 of what it says: equal for stores of the same pictures that were made in the same way."""
        return _digest(self._content())

    def to_json(self) -> bytes:
        """The file's content: equal indexes have equal bytes."""
        content = self._content() | {"digest": self.digest}
        return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.settings.codec,
            "items": self.items,
            "bits_per_value": round(self.bits_per_value, 6),
            "bytes_per_picture": round(self.bytes_per_picture, 3),
            **asdict(self),
        }

    @classmethod
    def load(cls, store: Path) -> Index:
        """Reads index.json. Raises StoreError where it is missing, damaged or of another version."""
        path = store / INDEX
        try:
            content = json.loads(read_regular(path))
            if content["format"] != FORMAT:
                raise StoreError(f"{path}: this is no index of a latent store")
            if content["version"] != VERSION:
                raise StoreError(
                    f"{path}: format version {content['version']}, this package reads version {VERSION}"
                )
            if content.pop("digest") != _digest(content):
                raise StoreError(
                    f"{path}: damaged, its digest does not fit its content; `latentcodec finish` writes it anew"
                )
            shards = [ShardEntry(**{**s, "shape": tuple(s["shape"])}) for s in content["shards"]]
            _check_entries(path, shards)
            index = cls(Settings(**content["settings"]), content["normalisation"], shards, content["rejected"],
                        content["dropped"], content["samples"], content["machine"])  # fmt: skip
        except FileNotFoundError as error:
            raise StoreError(_no_index(store)) from error
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{path}: damaged ({type(error).__name__}: {error})") from error
        if content["items"] != index.items:
            raise StoreError(f"{path}: says {content['items']} items, its shards have {index.items}")
        return index


def _check_entries(path: Path, shards: list[ShardEntry]) -> None:
    """Raises StoreError where a shard lies elsewhere than a shard of its shape can, or is there twice."""
    seen: set[int] = set()
    for entry in shards:
        number = int(Path(entry.file).stem)
        if entry.file != shard_file(entry.shape, number) or number in seen or entry.items < 0:
            raise StoreError(f"{path}: damaged, {entry.file!r} is no shard of this store")
        seen.add(number)


def _no_index(store: Path) -> str:
    if (store / "plan").is_dir():
        return (
            f"{store}: this store is not finished. Run the same `latentcodec encode` again, or `latentcodec finish` "
            "when all processes have ended"
        )
    return f"{store}: no latent store, it holds no {INDEX}"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


class LatentColumn(NamedTuple):
    """One column of latents."""

    name: str
    values: pa.DataType
    scale: str | None
    """Name of the column with the steps and the middles of its channels [2 c], for int8."""


def latent_columns(settings: Settings, shape: Shape) -> list[LatentColumn]:
    """The latent columns of a shard: latent, std and those of the mirrored picture, as far as they are stored."""
    names = ["latent"] + ["std"] * (settings.posterior != "mode")
    names += [MIRRORED[name] for name in names] if settings.mirrored else []
    c, h, w = shape
    value = STORED[settings.dtype]
    stored = (
        pa.binary(c * h * w * ITEM_BYTES[settings.dtype])
        if value is None
        else pa.list_(pa.field("item", value, nullable=False), c * h * w)
    )
    return [LatentColumn(n, stored, f"{n}_scale" if settings.dtype == "int8" else None) for n in names]


def row_bytes(settings: Settings, shape: Shape) -> int:
    """What the latents of one picture take, all columns together; without the scales of int8."""
    return len(latent_columns(settings, shape)) * math.prod(shape) * ITEM_BYTES[settings.dtype]


def shard_schema(settings: Settings, shape: Shape) -> pa.Schema:
    """The columns of a shard, without its metadata."""
    columns = [pa.field(name, kind, nullable=name in ("caption", "label")) for name, kind in METADATA]
    scales = pa.list_(pa.field("item", pa.float32(), nullable=False), 2 * shape[0])
    for column in latent_columns(settings, shape):
        columns.append(pa.field(column.name, column.values, nullable=False))
        if column.scale:
            columns.append(pa.field(column.scale, scales, nullable=False))
    return pa.schema([*columns, pa.field(CHECKSUM, pa.uint64(), nullable=False)])


def shard_file(shape: Shape, number: int) -> str:
    """Path of a shard within the store."""
    return f"shards/{'x'.join(map(str, shape))}/{number:06}.arrow"


def row_checksum(metadata: dict[str, Any], latents: Sequence[bytes | memoryview]) -> int:
    """xxh3-64 of a row: its metadata as JSON in the order of `METADATA`, then the bytes of its latent columns."""
    named = [metadata[name] for name, _ in METADATA]
    digest = xxhash.xxh3_64(json.dumps(named, ensure_ascii=True, separators=(",", ":")).encode())
    for part in latents:
        digest.update(part)
    return digest.intdigest()
