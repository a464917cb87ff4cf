"""`latentcodec encode`: pictures from anywhere into a store of latents."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import latentcodec.cli.encode_options as option
from latentcodec.cli.output import DONE, LOOK, Codec, Json, counting, number_of, say_json, warn
from latentcodec.openmp import wait_briefly

if TYPE_CHECKING:
    from latentcodec.codec import LatentCodec
    from latentcodec.store.job import Job
    from latentcodec.store.plan import Plan

FAR_BELOW = 10.0  # dB under the mean of the sample: such a picture is named


def encode(
    sources: option.Sources,
    codec: Codec,
    out: option.Out,
    size: option.Size = None,
    area: option.Area = None,
    multiple: option.Multiple = None,
    min_side: option.MinSide = 0,
    dtype: option.Dtype = "float16",
    std: option.Std = False,
    mirrored: option.Mirrored = False,
    no_codec: option.NoCodec = False,
    shard_size: option.ShardSize = 1024,
    check: option.Check = 16,
    image_column: option.ImageColumn = None,
    caption_column: option.CaptionColumn = None,
    label_column: option.LabelColumn = None,
    subset: option.Subset = None,
    split: option.Split = "train",
    device: option.Device = None,
    batch: option.Batch = 0,
    precision: option.Precision = None,
    threads: option.Threads = None,
    workers: option.Workers = None,
    rank: option.Rank = None,
    world: option.World = None,
    engine: option.Engine = "local",
    dry_run: option.DryRun = False,
    as_json: Json = False,
) -> int:
    """Encode pictures into a store of latents.

        latentcodec encode photos --codec photo-f8c16 --out latents --size 256

        latentcodec encode photos more/*.tar --codec photo-f8c4 --out latents --area 1048576 --multiple 64

        torchrun --nproc_per_node 4 -m latentcodec encode photos --codec photo-f8c16 --out latents

    Killed at any moment, the same command goes on, with any number of processes; run on a finished store it adds the
    pictures that are new. Captions are the .txt files beside the pictures. Pictures that cannot be read are listed in
    rejects.jsonl; the exit code is 3 then.
    """
    wait_briefly()  # or the threads of the model hold up the workers that decode pictures
    from latentcodec.codec import LatentCodec
    from latentcodec.store.items import Columns
    from latentcodec.store.job import encode as encode_shards
    from latentcodec.store.job import prepare

    begun = time.monotonic()
    rank, world = _share(engine, rank, world)
    model = LatentCodec.from_pretrained(codec)
    elsewhere = engine == "ray" and not dry_run  # which measures on this machine
    plan = prepare(
        sources, out, model, size=size, area=area, multiple=multiple, min_side=min_side, dtype=dtype,
        posterior="mean and std" if std else "mode", mirrored=mirrored, shard_size=shard_size, sampled=check,
        columns=Columns(image_column, caption_column, label_column, subset, split), batch=batch,
        device=_device_of_actors(device) if elsewhere else device, elsewhere=elsewhere,
        threads=threads, precision=precision, keep_codec=not no_codec, save=not dry_run,
    )  # fmt: skip
    _say_left_out(plan)
    if dry_run:
        return _estimate(plan, model, out, device, as_json)
    with counting(_pictures(plan, out, rank, world), "picture") as advance:
        if engine == "ray":
            from latentcodec.store.ray import encode_with_ray

            job = encode_with_ray(
                out, codec if no_codec else None, device=device, workers=workers or 0, progress=advance
            )
        else:
            job = encode_shards(out, model, rank, world, device, workers, advance)
    return report(job, out, time.monotonic() - begun, world, as_json)


def _share(engine: str, rank: int | None, world: int | None) -> tuple[int, int]:
    """This process and their number. Raises ValueError for an engine that is none, or that takes no such option."""
    from latentcodec.store.ranks import rank_and_world

    if engine == "local":
        return rank_and_world(rank=rank, world=world)
    if engine != "ray":
        raise ValueError(f"--engine {engine}: local or ray")
    for name, value in (("--rank", rank), ("--world", world)):
        if value is not None:
            raise ValueError(
                f"{name} {value}: leave it out with --engine ray, Ray chooses who encodes which shard"
            )
    return 0, 1


def _device_of_actors(device: str | None) -> str | None:
    """What is planned for Ray's actors: what was asked for, else GPUs where the machine or the cluster has some."""
    import torch

    from latentcodec.store.ray import device_of_actors

    return device_of_actors() if device is None and not torch.cuda.is_available() else device


def _pictures(plan: Plan, out: Path, rank: int, world: int) -> int:
    """How many pictures this process has still to encode."""
    from latentcodec.store.job import missing_shards

    return sum(plan.rows(shard) for shard in missing_shards(out, plan) if shard % world == rank)


def _say_left_out(plan: Plan) -> None:
    """Says before anything long begins what the plan leaves out, by reason."""
    from latentcodec.pixels.folders import LeftOut, counted

    rejects = plan.rejects()
    items = [LeftOut(item["path"], item["reason"].removeprefix(f"{item['path']}: ")) for item in rejects]
    if items:
        warn(f"left out: {counted(items)}; the first is {items[0].path}")


def report(job: Job, out: Path, seconds: float, world: int, as_json: bool) -> int:
    """Says what was done; the exit code."""
    encoded = sum(receipt.rows for receipt in job.receipts if receipt.written)
    rejected = sum(receipt.rejected for receipt in job.receipts)
    line: dict[str, Any] = {"items": encoded, "rejected": rejected, "seconds": round(seconds, 2)}
    line["images_per_second"] = round(encoded / seconds, 3)
    if job.index is None:
        print(f"{number_of(encoded, 'picture')} encoded by this process; others have shards of {out} to do")
        say_json(as_json, line)
        return DONE
    index, samples = job.index, job.index.samples
    print(f"{number_of(encoded, 'picture')} encoded, {encoded / seconds:.1f}/s")
    print(
        f"{out}: {number_of(index.items, 'picture')}, {index.rejected:,} left out; {index.bits_per_value:.2f} bits a "
        f"value, {index.bytes_per_picture:,.0f} bytes a picture"
    )
    if samples:
        lowest, dtype = samples["lowest"], index.settings.dtype
        print(f"decoded: {samples['psnr']:.2f} dB PSNR; {dtype} costs {samples['loss']:.4f} dB of it")
        if lowest["psnr"] < samples["psnr"] - FAR_BELOW:
            warn(f"{lowest['path']}: decoded at {lowest['psnr']:.1f} dB, far below the mean of the sample")
    if not index.items:
        warn(f"{out}: nothing was encoded")
    if index.rejected:
        print(f"left out: {out / 'rejects.jsonl'} names each picture and the reason")
    line |= {
        "items": index.items,
        "rejected": index.rejected,
        "psnr": samples.get("psnr"),
        "bits_per_value": index.bits_per_value,
        "fingerprint": index.settings.codec,
    }
    say_json(as_json, line)
    return LOOK if index.rejected and world == 1 else DONE


def _estimate(plan: Plan, codec: LatentCodec, out: Path, device: str | None, as_json: bool) -> int:
    """Says what encoding would do: pictures, buckets, bytes, and the time by one batch that is encoded now."""
    from latentcodec.store.estimate import estimate

    found = estimate(plan, codec, out, device)
    pictures, shards = number_of(found.pictures, "picture"), number_of(found.shards, "shard")
    print(f"{pictures} in {shards}, {found.rejected:,} left out")
    for shape, count in found.shapes.items():
        print(f"  {'x'.join(map(str, shape)):>14}  {count:,}")
    print(f"{found.bytes / 2**30:.2f} GiB ({found.free_bytes / 2**30:.0f} GiB free)")
    print(f"{found.seconds / 3600:.2f} hours in one process like this one")
    if found.bytes > found.free_bytes:
        warn(f"{out}: the disk has too little room")
    say_json(
        as_json,
        {
            "items": found.pictures,
            "rejected": found.rejected,
            "shards": found.shards,
            "bytes": found.bytes,
            "seconds": round(found.seconds, 3),
            "fingerprint": plan.settings.codec,
        },
    )
    return DONE
