"""Small stores for the tests: a codec of a few thousand weights, a folder of pictures, processes that can be killed."""

from __future__ import annotations

import hashlib
import os
import signal
import traceback
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latentcodec.codec import LatentCodec
from latentcodec.store import LatentStore, encode, prepare

SMALL = dict(shard_size=4, sampled=2, batch=2, threads=1, precision="float32")


def tiny_codec(seed: int = 0, latent_channels: int = 4) -> LatentCodec:
    """f = 4, a fraction of a second for anything."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 16],
        latent_channels=latent_channels,
        norm_num_groups=2,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    return LatentCodec(vae)


def write_pictures(
    folder: Path, count: int, sizes=((32, 32),), captions: bool = False, first: int = 0
) -> Path:
    """Pictures with structure; `sizes` (height, width) in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        random = np.random.default_rng(number)
        height, width = sizes[number % len(sizes)]
        coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
        if captions:
            (folder / f"{number:03}.txt").write_text(f"picture {number}\n")
    return folder


def make(sources, out, codec: LatentCodec, **options):
    """Encodes one source, or a list of them, to a store in this process; gives the job."""
    listed = sources if isinstance(sources, list) else [sources]
    prepare([str(source) for source in listed], out, codec, **{**SMALL, **options})
    return encode(out, codec, workers=0)


def make_and_open(sources, out, codec: LatentCodec, **options) -> LatentStore:
    """The same; gives the store."""
    make(sources, out, codec, **options)
    return LatentStore(out)


def digest(store: Path) -> str:
    """sha256 of every file of a store but its codec, hidden ones included."""
    found = hashlib.sha256()
    for path in sorted(store.rglob("*")):
        if path.is_file() and "codec" not in path.relative_to(store).parts:
            found.update(str(path.relative_to(store)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def in_process(work, *arguments) -> int:
    """Runs `work` in a process of its own, a fork; its exit status, negative after a signal."""
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_once(works) -> list[int]:
    """Runs each work in a process of its own, all at the same time; their exit statuses."""
    children = []
    for work in works:
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


class KilledAt:
    """Kills this process, as kill -9 does, just before its file operation number `number`."""

    NAMES = ("fsync", "replace", "link", "rename", "unlink")

    def __init__(self, number: int) -> None:
        self.left = number
        for name in self.NAMES:
            setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, operation):
        def watched(*arguments, **options):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            return operation(*arguments, **options)

        return watched
