"""What an encoding will still take: pictures, bytes and hours, from the plan and one batch that is encoded on trial."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from latentcodec.codec import LatentCodec
from latentcodec.store.decoding import decode_pictures
from latentcodec.store.encoding import encode_batch, placed, threads
from latentcodec.store.format import ITEM_BYTES, Shape
from latentcodec.store.job import missing_shards
from latentcodec.store.plan import Plan

ROW_BYTES = 200  # of a row's metadata, about


@dataclass(frozen=True)
class Estimate:
    """What an encoding will take, from here on."""

    pictures: int
    rejected: int
    """Pictures whose header cannot be read; others may turn out to be broken later."""
    shards: int
    shapes: dict[Shape, int]
    """Pictures of each latent shape c, h, w."""
    bytes: int
    free_bytes: int
    seconds: float
    """In one process, from the second of two trial batches; without the time of decoding, which runs beside it."""


def estimate(plan: Plan, codec: LatentCodec, out: Path, device: str | None = None) -> Estimate:
    """Encodes one batch of the commonest shape, whose readable pictures stand for all, and adds up missing shards.

    On the plan's device (or `device`), in its precision and with its threads, as `encode` will. Raises StoreError for a
    device that is not here.
    """
    out = out.expanduser()
    settings, missing = plan.settings, missing_shards(out, plan)
    shapes: dict[Shape, int] = {}
    for shard in missing:
        shapes[plan.shape(shard)] = shapes.get(plan.shape(shard), 0) + plan.rows(shard)
    copies = (1 + (settings.posterior != "mode")) * (1 + settings.mirrored)
    values = sum(c * h * w * count for (c, h, w), count in shapes.items()) * copies
    pictures = sum(shapes.values())
    folder = next(folder for folder in [out.absolute(), *out.absolute().parents] if folder.exists())
    return Estimate(
        pictures=pictures,
        rejected=len(plan.rejects()),
        shards=len(missing),
        shapes=shapes,
        bytes=values * ITEM_BYTES[settings.dtype] + ROW_BYTES * pictures,
        free_bytes=shutil.disk_usage(folder).free,
        seconds=values * _seconds_per_value(plan, missing, codec, out, device) if pictures else 0.0,
    )


def _seconds_per_value(
    plan: Plan, missing: list[int], codec: LatentCodec, out: Path, device: str | None
) -> float:
    """Seconds that encoding takes for each number of a latent: pictures of other shapes take in proportion."""
    shard = max(missing, key=plan.rows)
    pictures = decode_pictures(plan, shard, 0, min(plan.batch(shard), plan.rows(shard)))
    ready = [picture for picture in pictures if picture.reason is None]
    if not ready:
        return 0.0
    machine = plan.part(shard).machine
    model = placed(codec, machine, device, out)
    with threads(machine["threads"]):
        encode_batch(model, ready, plan.settings)  # the first one prepares
        begun = time.perf_counter()
        latents = encode_batch(model, ready, plan.settings)
        seconds = time.perf_counter() - begun
    return seconds / sum(z.numel() for z in latents.values())
