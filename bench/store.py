"""How fast latents are read and written, how much room they take and what storing them costs: the store and its rivals.

    python bench/store.py --out FOLDER [--items 2048 --rounds 5] [--codec photo-f8c16 --images PHOTOS]

The same random latents (16 x 32 x 32 float16) with id, size and caption lie in a store, in one .npz, .pt or
.safetensors file a picture, in parquet and in WebDataset tars. Every reader gives a tensor and the metadata of a
picture. They are timed in turn, A B C A B C, on one thread, the files in the page cache; each figure is the median of
the rounds. With --codec and --images it also decodes photographs from each number format and states the loss in dB of
PSNR. Prints tables, writes FOLDER/store.json and ends stdout with the same data as one line of JSON.

Shapes: c latent channels, h w latent cells.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.files import write_whole
from latentcodec.machine import cpu_name, instruction_sets
from latentcodec.pixels import find_images, from_uint8, load_image, to_uint8
from latentcodec.quality.metrics import psnr
from latentcodec.store.export import export
from latentcodec.store.format import Index, Settings, shard_file
from latentcodec.store.quantize import TORCH, dequantize, quantize
from latentcodec.store.read import LatentStore
from latentcodec.store.shard import Shard
from latentcodec.store.verification import checked_entry
from latentcodec.store.write import Row, shard_batch, shard_bytes

SHAPE = (16, 32, 32)
BATCH = 64
SHARD = 1024
PARQUET_SAMPLE = 64  # pictures that are read at random from parquet
PICTURES = 12  # whose loss is measured


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder for store.json")
    parser.add_argument("--items", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--codec", help="to measure what each number format costs")
    parser.add_argument("--images", type=Path, help=f"folder of photographs, of which {PICTURES} are decoded")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "instructions": instruction_sets(), "threads": 1},
        "items": settings.items,
        "shape": SHAPE,
        "rounds": settings.rounds,
    }
    with tempfile.TemporaryDirectory() as folder:
        latents = np.random.default_rng(0).standard_normal((settings.items, *SHAPE)).astype(np.float16)
        result["formats"] = measure_formats(Path(folder), torch.from_numpy(latents), settings.rounds)
    if settings.codec and settings.images:
        result["loss_db"] = losses(LatentCodec.from_pretrained(settings.codec), settings.images)
        print("loss of PSNR in dB:", ", ".join(f"{k} {v:.4f}" for k, v in result["loss_db"].items()))
    write_whole(settings.out / "store.json", (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result))


def measure_formats(folder: Path, latents: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """By format: seconds of writing, bytes a picture, and pictures a second of each way of reading."""
    rows = [_row(number) for number in range(len(latents))]
    figures: dict[str, dict[str, float]] = {}
    ways: dict[tuple[str, str], Callable[[], None]] = {}
    order = np.random.default_rng(1).permutation(len(latents)).tolist()
    for name, (write, open_readers) in _formats().items():
        here = folder / name.replace(" ", "-")
        begun = time.perf_counter()
        write(here, latents, rows)
        figures[name] = {"write_items_per_second": len(latents) / (time.perf_counter() - begun)}
        figures[name]["bytes_per_item"] = _bytes(here) / len(latents)
        for way, reader in open_readers(here, order).items():
            ways[name, way] = reader
    timings: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
    for _ in range(rounds + 1):  # the first one fills the page cache
        for key, reader in ways.items():
            begun = time.perf_counter()
            reader()
            timings[key].append(time.perf_counter() - begun)
    for (name, way), seconds in timings.items():
        count = min(PARQUET_SAMPLE, len(latents)) if (name, way) == ("parquet", "random") else len(latents)
        figures[name][f"{way}_items_per_second"] = count / median(seconds[1:])
    _print(figures)
    return figures


def losses(codec: LatentCodec, images: Path) -> dict[str, float]:
    """By number format: mean loss in dB of PSNR of the 8-bit pictures, against the float32 latent of the same ones."""
    loss: dict[str, list[float]] = {dtype: [] for dtype in TORCH}
    for path in find_images(images)[:PICTURES]:
        x = load_image(path, codec.image_channels)
        size = (x.shape[-2], x.shape[-1])
        z = codec.encode(x).cpu()
        scores = {}
        for dtype in TORCH:
            y = codec.decode(dequantize(quantize(z, dtype)).float(), size=size).cpu()
            scores[dtype] = psnr(x, from_uint8(to_uint8(y))).item()
        for dtype, score in scores.items():
            loss[dtype].append(scores["float32"] - score)
    return {dtype: round(fmean(values), 5) for dtype, values in loss.items()}


def _row(number: int) -> Row:
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


def _formats() -> dict[str, tuple[Callable[..., None], Callable[..., dict[str, Callable[[], None]]]]]:
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
        write_whole(path, shard_bytes(batch, {"rejects": [], "samples": []}))
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


def _bytes(folder: Path) -> int:
    """On the disk, in whole blocks, since small files fill theirs only in part."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _print(figures: dict[str, dict[str, float]]) -> None:
    columns = ("random", "random_batches", "sequential")
    print(
        f"{'items a second':18}{'random':>12}{'in batches':>12}{'in order':>12}{'written':>12}{'bytes each':>12}"
    )
    for name, values in figures.items():
        shown = [values.get(f"{column}_items_per_second") for column in columns]
        shown += [values["write_items_per_second"], values["bytes_per_item"]]
        print(f"{name:18}" + "".join(f"{'-' if v is None else f'{v:,.0f}':>12}" for v in shown))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
