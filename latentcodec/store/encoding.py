"""ShardEncoder: one shard of a store's plan, from pictures to a file; called by every engine.

    encoder = ShardEncoder("latents")
    encoder(17)                               # a Receipt: written, or there already

Worker processes read and decode the pictures of the next batches while the model encodes, and a thread writes.

Shapes: B batch, C image channels, c latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentcodec.codec import LatentCodec, run_compiled
from latentcodec.files import write_whole
from latentcodec.latents import LatentSpace
from latentcodec.machine import usable_device
from latentcodec.ops.native.build import library
from latentcodec.pixels import from_uint8, to_uint8
from latentcodec.quality.metrics import psnr
from latentcodec.store.decoding import Decoded, decoded_batches
from latentcodec.store.format import CODEC, MIRRORED, Settings, StoreError, latent_columns
from latentcodec.store.picture import mirrored
from latentcodec.store.plan import Plan
from latentcodec.store.quantize import Quantized, dequantize, joined, quantize
from latentcodec.store.ranks import local_rank
from latentcodec.store.write import Row, shard_batch, shard_bytes

OF_TORCH = "torch's"  # functions, as a plan names them; plans that name none have these
LARGEST_PSNR = 100.0  # dB, that stands for equal pictures
Progress = Callable[[int, int], None]  # (encoded, left out) of a batch


class Receipt(NamedTuple):
    """What became of a shard."""

    shard: int
    written: bool
    """False where it was there already."""
    rows: int
    rejected: int


@dataclass
class _Content:
    """What a shard holds so far."""

    rows: list[Row] = field(default_factory=list)
    latents: dict[str, list[Quantized]] = field(default_factory=dict)
    rejects: list[dict[str, str]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


class ShardEncoder:
    """Encodes shards of a plan, in any order and as often as you like: a shard that is there stays.

    It holds no engine: call it in a loop, a process pool, an actor.
    """

    def __init__(
        self,
        store: str | Path,
        codec: LatentCodec | str | None = None,
        device: str | None = None,
        workers: int = 0,
    ) -> None:
        """The codec is loaded at the first call; by default the copy in the store.

        `workers`: processes that decode pictures; 0 decodes in this one. Raises ValueError for a number below that, and
        StoreError for a store without a plan.
        """
        if workers < 0:
            raise ValueError(f"--workers {workers}: at least 0")
        self.store, self.device, self.workers = Path(store), device, workers
        self.plan = Plan.load(self.store)
        self._given = codec
        self._codecs: dict[tuple[str, str, str], LatentCodec] = {}

    def __call__(self, shard: int) -> Receipt:
        """Encodes one shard and waits until it is on the disk."""
        return next(self.run([shard]))

    def run(self, shards: Sequence[int], progress: Progress | None = None) -> Iterator[Receipt]:
        """Encodes shards one after another; gives a receipt when a shard is on the disk.

        Raises StoreError for another codec than the plan's and OSError where the disk refuses; what was written by then
        stays.
        """
        todo = [shard for shard in shards if not (self.store / self.plan.file(shard)).is_file()]
        missing = set(todo)
        for shard in shards:
            if shard not in missing:
                yield Receipt(shard, False, self.plan.rows(shard), 0)
        if not todo:
            return
        self._codec_of(todo[0])
        content, before = _Content(), None
        with ThreadPoolExecutor(1) as writer:
            for batch in decoded_batches(self.plan, todo, self.workers):
                content = _Content() if batch.is_first else content
                codec = self._codec_of(batch.shard)
                with threads(self.plan.part(batch.shard).machine["threads"]):
                    left_out = add(content, codec, batch.pictures, self.plan.settings)
                if progress is not None:
                    progress(len(batch.pictures) - left_out, left_out)
                if batch.is_last:
                    if before is not None:
                        yield before.result()
                    before = writer.submit(self._write, batch.shard, content)
            assert before is not None
            yield before.result()

    def _codec_of(self, shard: int) -> LatentCodec:
        """The codec, on the device, in the precision and with the functions of the shard's part of the plan."""
        machine = self.plan.part(shard).machine
        kind = self.device or machine["device"], machine["precision"], machine.get("functions", OF_TORCH)
        if kind not in self._codecs:
            self._codecs[kind] = placed(self._planned_codec(), machine, self.device, self.store)
        return self._codecs[kind]

    def _planned_codec(self) -> LatentCodec:
        """The codec that was given, or the copy in the store. Raises StoreError where it is not the plan's."""
        source = self._given
        if source is None:
            if not (self.store / CODEC).is_dir():
                raise StoreError(f"{self.store}: holds no copy of its codec; give the codec")
            source = str(self.store / CODEC)
        codec = source if isinstance(source, LatentCodec) else LatentCodec.from_pretrained(source)
        if (given := codec.fingerprint) != self.plan.settings.codec:
            raise StoreError(
                f"{self.store}: planned for the codec {self.plan.settings.codec}, the codec given is {given}"
            )
        return codec

    def _write(self, shard: int, content: _Content) -> Receipt:
        settings, shape = self.plan.settings, self.plan.shape(shard)
        latents = {}
        for column in latent_columns(settings, shape):
            parts = content.latents.get(column.name) or [quantize(torch.zeros(0, *shape), settings.dtype)]
            latents[column.name] = joined(parts)
        about = {
            "shard": shard,
            "codec": settings.codec,
            "dtype": settings.dtype,
            "shape": list(shape),
            "rejects": content.rejects,
            "samples": content.samples,
        }
        batch = shard_batch(settings, shape, content.rows, latents)
        write_whole(self.store / self.plan.file(shard), shard_bytes(batch, about))
        return Receipt(shard, True, len(content.rows), len(content.rejects))


def placed(codec: LatentCodec, machine: Mapping[str, Any], device: str | None, store: Path) -> LatentCodec:
    """The codec as a part of a plan encodes with it: in the precision of its `machine`, on its device or on `device`.

    A GPU without a number is the one that the codec is on, or this process' own. There compiled functions run, but for
    a part that was begun on a GPU with torch's. The codec given stays as it is. Raises StoreError naming the store for
    a device that is not here.
    """
    try:
        place, dtype = usable_device(device or machine["device"]), getattr(torch, machine["precision"])
    except ValueError as error:
        raise StoreError(f"{store}: {error} (--device), or go on with it where it was begun") from None
    if place == torch.device("cuda"):
        place = codec.device if codec.device.type == "cuda" else _own_gpu()
    if place.type == "cpu":
        library()  # from the first shard on, since torch's functions differ in the last bits
    begun_with = machine["device"], machine.get("functions", OF_TORCH)
    is_compiled = place.type == "cuda" and begun_with != ("cuda", OF_TORCH)
    if (codec.device, codec.dtype) == (place, dtype) and not is_compiled:
        return codec
    copied = LatentCodec.from_pretrained(copy.deepcopy(codec.vae), device=place, dtype=dtype)
    return run_compiled(copied) if is_compiled else copied


def _own_gpu() -> torch.device:
    """Of the GPUs of this machine that of this process, where a launcher has started several; else torch's current."""
    number = local_rank()
    return torch.device("cuda" if number is None else f"cuda:{number % torch.cuda.device_count()}")


def add(content: _Content, codec: LatentCodec, pictures: list[Decoded], settings: Settings) -> int:
    """Encodes a batch and adds it to a shard's content; returns how many pictures were left out."""
    ready = [picture for picture in pictures if picture.reason is None]
    latents = encode_batch(codec, ready, settings) if ready else {}
    stored = {name: quantize(z, settings.dtype) for name, z in latents.items()}
    sound = _finite_rows(latents, stored) if ready else torch.zeros(0, dtype=torch.bool)
    for name, kept in stored.items():
        content.latents.setdefault(name, []).append(kept.rows(sound))
    place = 0
    left_out = 0
    for picture in pictures:
        reason = picture.reason
        if reason is None:
            if sound[place]:
                content.rows.append(_row(picture, settings))
                if picture.planned.is_sampled and picture.pixels is not None:
                    exact = latents["latent"][place : place + 1]
                    kept = stored["latent"].rows(slice(place, place + 1))
                    content.samples.append(_measured(codec, picture, exact, dequantize(kept)))
            else:
                reason = f"{picture.planned.entry.path}: its latent is not finite"
            place += 1
        if reason is not None:
            content.rejects.append({"path": picture.planned.entry.path, "reason": reason})
            left_out += 1
    return left_out


def encode_batch(codec: LatentCodec, pictures: list[Decoded], settings: Settings) -> dict[str, Tensor]:
    """The latent columns of some pictures: `latent` and what else is stored, [B, c, h, w] float32 on the CPU."""
    if settings.imported is not None:
        z = torch.stack([picture.latent for picture in pictures if picture.latent is not None])
        if settings.imported == "raw":
            z = LatentSpace.of(codec.vae).normalise(z.to(codec.device)).cpu()
        return {"latent": z}
    pixels = [picture.pixels for picture in pictures if picture.pixels is not None]
    latents = _posterior(codec, torch.stack([p.x for p in pixels]), settings)
    if settings.mirrored:
        flipped = torch.stack([mirrored(p, settings.downsampling_factor) for p in pixels])
        latents |= {MIRRORED[n]: z for n, z in _posterior(codec, flipped, settings).items()}
    return latents


def _posterior(codec: LatentCodec, x: Tensor, settings: Settings) -> dict[str, Tensor]:
    mean, std = codec.posterior(x)
    latents = {"latent": mean.float().cpu()}
    if settings.posterior != "mode":
        latents["std"] = std.float().cpu()
    return latents


def _finite_rows(latents: dict[str, Tensor], stored: dict[str, Quantized]) -> Tensor:
    """[B] bool: whether all numbers of a row are finite, before and after they were rounded for storage."""
    checks = [z.isfinite().flatten(1).all(1) for z in latents.values()]
    checks += [dequantize(kept).isfinite().flatten(1).all(1) for kept in stored.values()]
    return torch.stack(checks).all(0)


def _row(picture: Decoded, settings: Settings) -> Row:
    entry = picture.planned.entry
    if picture.pixels is not None:
        height, width = picture.pixels.size
    else:
        assert picture.latent is not None
        height, width = (side * settings.downsampling_factor for side in picture.latent.shape[1:])
    return {
        "id": entry.id,
        "source": entry.source,
        "height": height,
        "width": width,
        "original_height": picture.original[0],
        "original_width": picture.original[1],
        "crop_top": picture.crop[0],
        "crop_left": picture.crop[1],
        "caption": picture.caption,
        "label": picture.label,
    }


def _measured(codec: LatentCodec, picture: Decoded, exact: Tensor, stored: Tensor) -> dict[str, Any]:
    """PSNR in dB of one decoded picture, from the latent as stored and as it was before: [1, c, h, w] each."""
    assert picture.pixels is not None
    height, width = picture.pixels.size
    x = from_uint8(to_uint8(picture.pixels.x[None, :, :height, :width]))
    values = []
    for z in (stored, exact):
        y = codec.decode(z.float(), size=(height, width)).cpu()
        values.append(round(min(psnr(x, from_uint8(to_uint8(y))).item(), LARGEST_PSNR), 4))
    return {"path": picture.planned.entry.path, "psnr": values[0], "psnr_before_rounding": values[1]}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with so many threads on the CPU: sums in another order would change the last bits of a latent."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
