"""Latents in files of every format that people keep them in, written and read as each format's users do it.

The same pictures lie in a store, in one .npz, .pt or .safetensors file each, in parquet and in WebDataset tars. Every
reader gives a tensor and the metadata of a picture. Shapes: c latent channels, h w latent cells.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentcodec.files import write_whole
from latentcodec.store.export import export
from latentcodec.store.format import Index, Settings, shard_file
from latentcodec.store.quantize import quantize
from latentcodec.store.read import LatentStore
from latentcodec.store.shard import Shard
from latentcodec.store.verification import checked_entry
from latentcodec.store.write import Row, shard_batch, shard_bytes

SHAPE = (16, 32, 32)
BATCH = 64
SHARD = 1024
PARQUET_SAMPLE = 64  # pictures that are read at random from parquet


def row_of(number: int) -> Row:
    return {
        "id": f"photographs/{number:06}.jpg",
        "source": "/data/photographs",
        "height": 256,
        "width": 256,
        "original_height": 768,
        "original_width": 1024,
        "crop_top": 0,
        "crop_left": 42,
        "caption": f"a photograph, number {number}, of a street in the rain with people and cars",
        "label": number % 1000,
    }


def formats() -> dict[str, tuple[Callable[..., None], Callable[..., dict[str, Callable[[], None]]]]]:
    """By name: what writes all pictures into a folder, and the ways of reading them there."""
    files = {".npz": _read_npz, ".pt": _read_pt, ".safetensors": _read_safetensors}
    writers = {".npz": _write_npz, ".pt": _write_pt, ".safetensors": _write_safetensors}
    return {
        "store float16": (partial(_write_store, dtype="float16"), _store_readers),
        "store int8": (partial(_write_store, dtype="int8"), _store_readers),
        **{
            f"{suffix} files": (
                partial(_write_files, suffix, writers[suffix]),
                partial(_file_readers, suffix, read),
            )
            for suffix, read in files.items()
        },
        "parquet": (partial(_write_export, "parquet"), _parquet_readers),
        "webdataset": (partial(_write_export, "webdataset"), _tar_readers),
    }


# --- the store


def _write_store(folder: Path, latents: Tensor, rows: list[Row], dtype: str) -> None:
    settings = Settings("bench", SHAPE[0], 8, dtype=dtype)
    entries = []
    for number, start in enumerate(range(0, len(rows), SHARD)):
        part = {"latent": quantize(latents[start : start + SHARD], dtype)}
        batch = shard_batch(settings, SHAPE, rows[start : start + SHARD], part)
        path = folder / shard_file(SHAPE, number)
        write_whole(
            path, shard_bytes(batch, {"codec": "bench", "shard": number, "rejects": [], "samples": []})
        )
        entries.append(checked_entry(folder, Shard(path, settings, SHAPE)))
    write_whole(folder / "index.json", Index(settings, {}, entries, 0, []).to_json())


def _store_readers(folder: Path, order: list[int]) -> dict[str, Callable[[], None]]:
    store = LatentStore(folder)
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]

    def items() -> None:
        for number in order:
            store[number]

    def in_batches() -> None:
        for batch in batches:
            store.batch(batch)

    def in_order() -> None:
        for start in range(0, len(order), BATCH):
            store.batch(range(start, min(start + BATCH, len(order))))

    return {"random": items, "random_batches": in_batches, "sequential": in_order}


# --- one file a picture


def _write_files(
    suffix: str, write: Callable[..., None], folder: Path, latents: Tensor, rows: list[Row]
) -> None:
    folder.mkdir()
    for number, (latent, row) in enumerate(zip(latents, rows, strict=True)):
        write(folder / f"{number:06}{suffix}", latent, row)


def _write_npz(path: Path, latent: Tensor, row: Row) -> None:
    np.savez(path, latents=latent.numpy(), metadata=json.dumps(row))


def _read_npz(path: Path) -> tuple[Tensor, Any]:
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["latents"]), json.loads(str(arrays["metadata"]))


def _write_pt(path: Path, latent: Tensor, row: Row) -> None:
    torch.save({"latents": latent.clone(), **row}, path)


def _read_pt(path: Path) -> tuple[Tensor, Any]:
    content = torch.load(path, weights_only=True)
    return content["latents"], content


def _write_safetensors(path: Path, latent: Tensor, row: Row) -> None:
    save_file({"latents": latent.contiguous()}, path)
    path.with_suffix(".json").write_text(json.dumps(row))


def _read_safetensors(path: Path) -> tuple[Tensor, Any]:
    return load_file(path)["latents"], json.loads(path.with_suffix(".json").read_text())


def _file_readers(
    suffix: str, read: Callable[[Path], Any], folder: Path, order: list[int]
) -> dict[str, Callable[[], None]]:
    def items(numbers: Sequence[int]) -> None:
        for number in numbers:
            read(folder / f"{number:06}{suffix}")

    return {"random": partial(items, order), "sequential": partial(items, range(len(order)))}


# --- parquet and tars


def _write_export(to: str, folder: Path, latents: Tensor, rows: list[Row]) -> None:
    beside = folder.with_suffix(".store")
    _write_store(beside, latents, rows, "float16")
    export(LatentStore(beside), to, folder)
    shutil.rmtree(beside)


def _parquet_readers(folder: Path, order: list[int]) -> dict[str, Callable[[], None]]:
    files = [pq.ParquetFile(path) for path in sorted(folder.rglob("*.parquet"))]
    sample = order[:PARQUET_SAMPLE]  # a picture at random costs its row group: all of them would take minutes

    def items() -> None:
        for number in sample:
            group, row = divmod(number % SHARD, 64)
            table = files[number // SHARD].read_row_group(group).slice(row, 1)
            torch.from_numpy(table["latent"].chunk(0).flatten().to_numpy().reshape(SHAPE).copy())
            table.select(["id", "caption"]).to_pylist()

    def in_order() -> None:
        for file in files:
            for batch in file.iter_batches(BATCH):
                torch.from_numpy(batch["latent"].flatten().to_numpy().reshape(-1, *SHAPE).copy())
                batch.select(["id", "caption"]).to_pylist()

    return {"random": items, "sequential": in_order}


def _tar_readers(folder: Path, order: list[int]) -> dict[str, Callable[[], None]]:
    def in_order() -> None:
        for path in sorted(folder.rglob("*.tar")):
            for name, content in _members(path):
                if name.endswith(".json"):
                    json.loads(content)
                else:
                    torch.from_numpy(np.load(io.BytesIO(content)))

    return {"sequential": in_order}


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            yield member.name, content.read()
