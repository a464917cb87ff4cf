"""Encode a hostile folder while its processes are killed; the store must be the one of an undisturbed run.

    python tests/store/kill_encoding.py --files 10000 --kills 10 [--ray]

Of the files 5 % are broken, in eight ways. First one process encodes the folder in peace. Then, for 1, 2 and 4
processes, all of them are killed (kill -9) again and again at random moments, and what is left is finished by another
number of processes, or with --ray by Ray. Checked each time: one digest over every file of the store, exactly the
broken files listed, every other one once. Prints a line for each round and ends with one line of JSON; exit code 1 if
anything differs. Linux only. pytest does not collect this script.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from stores import digest, tiny_codec

from latentcodec.codec import LatentCodec
from latentcodec.store import LatentStore, encode, prepare, verify

SETTINGS = dict(size=32, shard_size=100, sampled=8, batch=16, threads=1, precision="float32")
SHARE_BROKEN = 0.05


def write_hostile_folder(folder: Path, count: int) -> set[str]:
    """`count` files, of which each twentieth is broken; returns the paths of the broken ones."""
    folder.mkdir()
    chance = random.Random(0)
    broken = set(chance.sample(range(count), int(count * SHARE_BROKEN)))
    names = set()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "PNG" if number % 2 else "JPEG")
        content = file.getvalue()
        path = folder / f"{number:06}.{'png' if number % 2 else 'jpg'}"
        if number in broken:
            names.add(str(path.resolve()))
            _write_broken(path, content, number)
        else:
            path.write_bytes(content)
    return names


def _write_broken(path: Path, content: bytes, number: int) -> None:
    kinds = {
        0: b"",
        1: content[: len(content) // 2],
        2: b"<html>404: not found</html>",
        3: bytes(1000),
        4: content[:20],
        5: b"8BPS\0\1" + bytes(100),
        6: random.Random(number).randbytes(500),
    }
    kind = number % 8
    if kind == 7:
        path.symlink_to(path.with_name("nowhere"))
    else:
        path.write_bytes(kinds[kind])


def start(photos: Path, store: Path, codec: LatentCodec, rank: int, world: int) -> int:
    """A process that does one rank's share; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        prepare([str(photos)], store, codec, **SETTINGS)
        encode(store, codec, rank, world, workers=0)
        status = 0
    finally:
        os._exit(status)


def run(photos: Path, store: Path, codec: LatentCodec, world: int, seconds: float | None = None) -> bool:
    """All ranks at once, killed after `seconds`; whether they all came to their end."""
    children = [start(photos, store, codec, rank, world) for rank in range(world)]
    if seconds is not None:
        time.sleep(seconds)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return not any(ends)


def check(store: Path, broken: set[str], count: int) -> list[str]:
    """What is wrong with a store, apart from its digest."""
    listed = [json.loads(line)["path"] for line in (store / "rejects.jsonl").read_text().splitlines()]
    ids = [item.id for item in LatentStore(store, check=True)]
    faults = []
    if sorted(listed) != sorted(broken):
        faults.append(f"{len(listed)} listed, {len(broken)} are broken")
    if len(ids) != len(set(ids)) or len(ids) != count - len(broken):
        faults.append(
            f"{len(ids)} items, {len(set(ids))} of them different, instead of {count - len(broken)}"
        )
    return faults + ([] if verify(store).ok else ["verify finds damage"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--ray", action="store_true", help="finish with Ray")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chance, faults = random.Random(1), []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        photos, codec = folder / "photos", tiny_codec()
        broken = write_hostile_folder(photos, settings.files)
        begun = time.monotonic()
        assert run(photos, folder / "peace", codec, 1)
        whole = time.monotonic() - begun
        expected = digest(folder / "peace")
        faults += check(folder / "peace", broken, settings.files)
        print(
            f"in peace: {whole:.1f} s, digest {expected[:16]}, {len(broken)} broken files {faults or 'listed'}",
            flush=True,
        )
        for world, finisher in ((1, 2), (2, 4), (4, 1)):
            store, kills = folder / f"killed-{world}", 0
            for _ in range(settings.kills):
                kills += not run(photos, store, codec, world, chance.uniform(0, whole / settings.kills))
            done = len(list(store.glob("shards/*/[0-9]*.arrow")))
            if settings.ray:
                from latentcodec.store.ray import encode_with_ray

                prepare([str(photos)], store, codec, **SETTINGS)
                encode_with_ray(store)
            else:
                run(photos, store, codec, finisher)
            found = check(store, broken, settings.files)
            found += [] if digest(store) == expected else ["another digest"]
            by = "Ray" if settings.ray else f"{finisher} processes"
            print(
                f"{world} processes: {kills} kills, {done} shards by then, finished by {by}: {found or 'the same'}",
                flush=True,
            )
            faults += found
    print(json.dumps({"files": settings.files, "broken": len(broken), "digest": expected, "faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
