"""A store for other tools: parquet files and WebDataset tars.

The shards themselves are Arrow files that pyarrow, `datasets` and polars read; these are for what reads neither. Each
shard becomes one file, written whole or not at all.

Shapes: n rows of a shard, c latent channels, h w latent cells.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentcodec.files import write_whole
from latentcodec.store.format import METADATA
from latentcodec.store.read import LatentStore
from latentcodec.store.shard import Shard

ROW_GROUP = 64  # rows that a reader of parquet must fetch for one of them
FORMATS = ("parquet", "webdataset")
ORIGIN = b"latentcodec"  # key in a parquet file's metadata: of which codec and which shard it is, as JSON


def export(
    store: LatentStore, to: str, folder: str | Path, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Writes the store as parquet or WebDataset files, one for each shard; returns them.

    Latents that Arrow has no number type for (int8 with scales, bfloat16, float8) become float32. A file that was made
    of the same shard stays, any other of its name is written anew. Raises ValueError for another format and for a
    folder with other such files, OSError where the disk refuses.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to}: give {' or '.join(FORMATS)}")
    is_of, write, suffix = (
        (_is_parquet_of, _write_parquet, ".parquet") if to == "parquet" else (_is_tar_of, _write_tar, ".tar")
    )
    shards, files = store.index.shards, []
    for number, entry in enumerate(shards):
        file = Path(folder, Path(entry.file).with_suffix(suffix).relative_to("shards"))
        if entry.items:
            files.append((number, file))
    _refuse_others(Path(folder), suffix, {file for _, file in files})
    for done, (number, file) in enumerate(files, 1):
        origin = json.dumps({"fingerprint": store.fingerprint, "sha256": shards[number].sha256})
        if not is_of(file, origin):
            write(file, origin, store.shard(number))
        if progress is not None:
            progress(done, len(files))
    return [file for _, file in files]


def _refuse_others(folder: Path, suffix: str, files: set[Path]) -> None:
    """Raises ValueError naming a file that a reader of the folder would take for one of this export."""
    if other := next((file for file in sorted(folder.glob(f"*/*{suffix}")) if file not in files), None):
        raise ValueError(f"{other}: no file of this export; delete it, or give a folder of its own (--out)")


def _is_parquet_of(file: Path, origin: str) -> bool:
    try:
        return (pq.read_schema(file).metadata or {}).get(ORIGIN) == origin.encode()
    except (OSError, pa.ArrowException):  # there is none, or it is damaged
        return False


def _write_parquet(file: Path, origin: str, shard: Shard) -> None:
    write_whole(file, _parquet(shard, origin))


def _is_tar_of(file: Path, origin: str) -> bool:
    beside = file.with_suffix(".json")
    return file.is_file() and beside.is_file() and beside.read_bytes() == origin.encode()


def _write_tar(file: Path, origin: str, shard: Shard) -> None:
    """A tar, and beside it a `.json` with its origin."""
    beside = file.with_suffix(".json")
    beside.unlink(missing_ok=True)  # or it would speak for another tar, were this process killed
    write_whole(file, _tar(shard))
    write_whole(beside, origin.encode())


def _latents(shard: Shard) -> dict[str, np.ndarray]:
    """[n, c, h, w] of each latent column, in a number format that all readers have."""
    names = [name for name in shard.columns if not name.endswith("_scale")]
    found = {name: shard.latents(range(len(shard)), name) for name in names}
    return {n: (z if shard.dtype in ("float32", "float16") else z.float()).numpy() for n, z in found.items()}


def _parquet(shard: Shard, origin: str) -> bytes:
    columns = {name: shard.batch.column(name) for name, _ in METADATA}
    for name, values in _latents(shard).items():
        flat = pa.array(values.reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, values[0].size)
    shape = json.dumps(list(shard.shape))
    table = pa.table(columns).replace_schema_metadata({b"latent_shape": shape, ORIGIN: origin})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="zstd")
    return sink.getvalue()


def _tar(shard: Shard) -> bytes:
    """`KEY.latent.npy` (and the other latent columns) and `KEY.json` for each row; the key is shard and row."""
    latents = _latents(shard)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(len(shard)):
            metadata = {name: shard.batch.column(name)[row].as_py() for name, _ in METADATA}
            key = f"{shard.path.stem}-{row:06}"
            for name, values in latents.items():
                content = io.BytesIO()
                np.save(content, values[row])
                _add(tar, f"{key}.{name}.npy", content.getvalue())
            _add(tar, f"{key}.json", json.dumps(metadata).encode())
    return sink.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
