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
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.machine import cpu_name, instruction_sets
from latentcodec.pixels import find_images, from_uint8, load_image, to_uint8
from latentcodec.quality.metrics import psnr
from latentcodec.report.results import print_last_line, write_json
from latentcodec.speed.latent_files import PARQUET_SAMPLE, SHAPE, formats, row_of
from latentcodec.store.quantize import TORCH, dequantize, quantize

PICTURES = 12  # whose loss is measured


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="folder for store.json")
    parser.add_argument("--items", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--codec", help="to measure what each number format costs")
    parser.add_argument("--images", type=Path, help=f"folder of photographs, of which {PICTURES} are decoded")
    settings = parser.parse_args(arguments)
    if (settings.codec is None) != (settings.images is None):
        parser.error("--codec and --images belong together: photographs are decoded by the codec")
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
    write_json(result, settings.out / "store.json")
    print_last_line(result)


def measure_formats(folder: Path, latents: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """By format: seconds of writing, bytes a picture, and pictures a second of each way of reading."""
    rows = [row_of(number) for number in range(len(latents))]
    figures: dict[str, dict[str, float]] = {}
    ways: dict[tuple[str, str], Callable[[], None]] = {}
    order = np.random.default_rng(1).permutation(len(latents)).tolist()
    for name, (write, open_readers) in formats().items():
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
