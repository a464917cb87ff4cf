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


def export(
    store: LatentStore, to: str, folder: str | Path, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Writes the store as parquet or WebDataset files, one for each shard; returns them.

    Latents that Arrow has no number type for (int8 with scales, bfloat16, float8) become float32. A file that is there
    stays. Raises ValueError for another format, OSError where the disk refuses.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to}: {' or '.join(FORMATS)}")
    writer = _parquet if to == "parquet" else _tar
    suffix = ".parquet" if to == "parquet" else ".tar"
    files = []
    for number, entry in enumerate(store.index.shards, 1):
        files.append(Path(folder, Path(entry.file).with_suffix(suffix).relative_to("shards")))
        if not files[-1].exists() and entry.items:
            write_whole(files[-1], writer(store.shard(number - 1)))
        if progress is not None:
            progress(number, len(store.index.shards))
    return [file for file in files if file.exists()]


def _latents(shard: Shard) -> dict[str, np.ndarray]:
    """[n, c, h, w] of each latent column, in a number format that all readers have."""
    names = [name for name in shard.columns if not name.endswith("_scale")]
    found = {name: shard.latents(range(len(shard)), name) for name in names}
    return {n: (z if shard.dtype in ("float32", "float16") else z.float()).numpy() for n, z in found.items()}


def _parquet(shard: Shard) -> bytes:
    columns = {name: shard.batch.column(name) for name, _ in METADATA}
    for name, values in _latents(shard).items():
        flat = pa.array(values.reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, values[0].size)
    shape = json.dumps(list(shard.shape))
    table = pa.table(columns).replace_schema_metadata({"latent_shape": shape})
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
