"""How well `latentcodec encode` decodes pictures while the model encodes: the rate of each alone, and of both together.

    python bench/encoding.py PHOTOS --codec photo-f8c4 --out FOLDER [--size 256 --workers 1 --threads 1 --rounds 3]

Where the two share no core (the model on a GPU, or its threads and the workers within the cores), both together should
reach the smaller of the two rates. Each rate is counted from the first batch that is done to the last one, so that
starting processes is left out; the three are measured in turn, and each figure is the median of the rounds. Writes
FOLDER/encoding.json and ends stdout with the same data as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from latentcodec.codec import LatentCodec
from latentcodec.files import write_whole
from latentcodec.machine import cpu_name, instruction_sets
from latentcodec.store import encode, prepare
from latentcodec.store.decoding import decoded_batches
from latentcodec.store.encoding import encode_batch, placed
from latentcodec.store.plan import Plan


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--codec", required=True)
    parser.add_argument("--out", required=True, type=Path, help="folder for encoding.json")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="processes that decode")
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args(arguments)
    codec = LatentCodec.from_pretrained(settings.codec)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        plan = prepare(
            settings.sources, store, codec, size=settings.size, threads=settings.threads, batch=settings.batch,
            precision="float32", sampled=0,
        )  # fmt: skip
        model = placed(codec, plan.parts[0].machine, None, store)  # as `together` places it
        ways: dict[str, Callable[[], float]] = {
            "decoding": lambda: decoding(plan, settings.workers),
            "encoding": lambda: encoding(plan, model, settings.threads),
            "together": lambda: together(store, codec, settings.workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(settings.rounds):
            for name, way in ways.items():
                rates[name].append(way())
    figures = {name: median(values) for name, values in rates.items()}
    share = figures["together"] / min(figures["decoding"], figures["encoding"])
    for name, rate in figures.items():
        print(f"{name:10}{rate:10.2f} pictures a second")
    print(f"together: {share:.2f} of the smaller of the two")
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "instructions": instruction_sets()},
        "settings": {key: str(value) for key, value in vars(settings).items() if key != "out"},
        "pictures_per_second": rates,
        "share_of_the_smaller": share,
    }
    write_whole(settings.out / "encoding.json", (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result))


def decoding(plan: Plan, workers: int) -> float:
    """Pictures a second that the workers hand over, when nobody keeps them waiting."""
    return _rate(
        (time.perf_counter(), len(batch.pictures))
        for batch in decoded_batches(plan, list(plan.shards), workers)
    )


def encoding(plan: Plan, codec: LatentCodec, threads: int) -> float:
    """Pictures a second of the model: one batch again and again, as often as there are batches."""
    pictures = [
        picture for picture in next(decoded_batches(plan, list(plan.shards), 0)).pictures if picture.pixels
    ]
    batches = sum(-(-plan.rows(shard) // plan.batch(shard)) for shard in plan.shards)

    def encoded() -> Iterator[tuple[float, int]]:
        for _ in range(batches):
            encode_batch(codec, pictures, plan.settings)
            yield time.perf_counter(), len(pictures)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _rate(encoded())
    finally:
        torch.set_num_threads(before)


def together(store: Path, codec: LatentCodec, workers: int) -> float:
    """Pictures a second of an encoding from the start, as the command does it."""
    shutil.rmtree(store / "shards", ignore_errors=True)
    (store / "index.json").unlink(missing_ok=True)
    passed: list[tuple[float, int]] = []
    encode(store, codec, 0, 1, None, workers, lambda done, _: passed.append((time.perf_counter(), done)))
    return _rate(iter(passed))


def _rate(batches: Iterator[tuple[float, int]]) -> float:
    """Of the moments at which batches were done, and their pictures: those after the first one, a second."""
    (begun, _), *others = batches
    if not others:
        raise ValueError(
            "the pictures fill one batch only, which shows no rate: give more, or a smaller --batch"
        )
    return sum(count for _, count in others) / (others[-1][0] - begun)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
