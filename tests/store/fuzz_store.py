"""Damage pictures, shards and indexes at random; nothing may crash, hang, give NaN or be read wrongly in silence.

    python tests/store/fuzz_store.py --pictures 20000 --shards 10000

A mutated picture must give finite latents or an UnreadableImage within 5 seconds. A mutated shard, plan or index must
either be refused with a StoreError, or give the rows that were written: each item that LatentStore(check=True) hands
out is compared with the original. Prints counts and ends with one line of JSON; exit code 1 if anything went wrong.
pytest runs a short form; it does not collect this script.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from stores import SMALL, tiny_codec, write_pictures

from latentcodec.pixels import UnreadableImage
from latentcodec.pixels.containers import FORMATS
from latentcodec.store import LatentStore, StoreError, encode, prepare
from latentcodec.store.format import Settings
from latentcodec.store.picture import read_pixels
from latentcodec.store.plan import Plan

LONGEST_SECONDS = 5.0


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A few bits flipped, bytes replaced, a piece cut out, doubled, or zeroed, or the end cut off."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8, 64))):
        place = chance.randrange(max(1, len(found)))
        length = chance.choice((1, 4, 64, 1024))
        match chance.randrange(6):
            case 0 | 1 if found:
                found[place % len(found)] ^= 1 << chance.randrange(8)
            case 2:
                found[place : place + length] = chance.randbytes(length)
            case 3:
                del found[place : place + length]
            case 4:
                found[place:place] = found[place : place + length]
            case 5:
                found = found[:place] if chance.random() < 0.2 else found
    return bytes(found)


def fuzz_pictures(count: int, seed: int) -> Counter[str]:
    """Mutated files of every format through `read_pixels` and the codec."""
    chance, tally = random.Random(seed), Counter()
    codec = tiny_codec()
    settings = Settings("", 4, 4, size=32)
    noise = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    originals = []
    for form in FORMATS:
        file = io.BytesIO()
        Image.fromarray(noise).save(file, form)
        originals.append(file.getvalue())
    for _ in range(count):
        begun = time.monotonic()
        try:
            x = read_pixels(mutated(chance.choice(originals), chance), "mutated", settings, None).x
            outcome = "latent" if codec.encode(x[None]).isfinite().all() else "FAULT: not finite"
        except UnreadableImage:
            outcome = "refused"
        tally[outcome] += 1
        if time.monotonic() - begun > LONGEST_SECONDS:
            tally["FAULT: slow"] += 1
    return tally


def fuzz_store(count: int, seed: int, folder: Path) -> Counter[str]:
    """Mutated shards, indexes and plans of small stores in each number format."""
    chance, tally = random.Random(seed), Counter()
    photos = write_pictures(folder / "photos", 6, captions=True)
    stores = []
    for dtype in ("float16", "int8", "bfloat16"):
        prepare([str(photos)], folder / dtype, tiny_codec(), dtype=dtype, **SMALL)
        encode(folder / dtype, workers=0)
        stores.append((folder / dtype, list(LatentStore(folder / dtype))))
    for _ in range(count):
        store, originals = chance.choice(stores)
        files = [*store.glob("shards/*/*.arrow"), store / "index.json", store / "plan/0000.arrow"]
        path = chance.choice(files)
        content = path.read_bytes()
        begun = time.monotonic()
        path.write_bytes(mutated(content, chance))
        try:
            tally[_outcome(store, originals)] += 1
        finally:
            path.write_bytes(content)
        if time.monotonic() - begun > LONGEST_SECONDS:
            tally["FAULT: slow"] += 1
    return tally


def _outcome(store: Path, originals: list) -> str:
    try:
        Plan.load(store)
        opened = LatentStore(store, check=True)
        if len(opened) != len(originals):
            return "FAULT: another number of items"
        for item, original in zip(opened, originals, strict=True):
            if item[0] != original[0] or item[2:8] != original[2:8] or not torch.equal(item[1], original[1]):
                return "FAULT: wrong item"
    except StoreError:
        return "refused"
    return "intact"


def faults(tally: Counter[str]) -> int:
    """How often something went wrong."""
    return sum(count for outcome, count in tally.items() if outcome.startswith("FAULT"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20000)
    parser.add_argument("--shards", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of damaged EXIF data and colour profiles
    pictures = fuzz_pictures(settings.pictures, settings.seed)
    print("pictures:", dict(pictures))
    with tempfile.TemporaryDirectory() as folder:
        shards = fuzz_store(settings.shards, settings.seed, Path(folder))
    print("shards, indexes, plans:", dict(shards))
    print(json.dumps({"pictures": pictures, "shards": shards, "faults": faults(pictures + shards)}))
    return 1 if faults(pictures + shards) else 0


if __name__ == "__main__":
    sys.exit(main())
