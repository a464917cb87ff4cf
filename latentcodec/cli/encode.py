"""`latentcodec encode`: pictures from anywhere into a store of latents."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentcodec.cli.output import DONE, LOOK, Codec, Json, counting, say_json, warn

if TYPE_CHECKING:
    from latentcodec.codec import LatentCodec
    from latentcodec.store.job import Job
    from latentcodec.store.plan import Plan

FAR_BELOW = 10.0  # dB under the mean of the sample: such a picture is named


def _option(text: str, *names: str, panel: str | None = None, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


SIZE, STORED, SOURCE, RUN = "Size of the pictures", "What is stored", "Data sets", "How it runs"


def encode(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders, image files, patterns, .tar and .parquet files, data sets of `datasets`."
        ),
    ],
    codec: Codec,
    out: Annotated[Path, _option("Folder of the store.", "--out", "-o", show_default=False)],
    size: Annotated[
        int | None,
        _option("Pixels of the square centre, after the shorter side was scaled to it.", panel=SIZE),
    ] = None,
    area: Annotated[
        int | None, _option("Pixels of a bucket: sides that keep about the picture's ratio.", panel=SIZE)
    ] = None,
    multiple: Annotated[
        int | None, _option("Pixels that a bucket's sides are multiples of.", panel=SIZE)
    ] = None,
    min_side: Annotated[int, _option("Leave out pictures with a shorter side.", panel=SIZE)] = 0,
    dtype: Annotated[
        str,
        _option(
            "float32, float16, bfloat16, int8 (range of each picture and channel), float8.", panel=STORED
        ),
    ] = "float16",
    std: Annotated[
        bool,
        _option("Store the posterior's deviation too, so that training draws fresh samples.", panel=STORED),
    ] = False,
    mirrored: Annotated[
        bool, _option("Store the latents of the mirrored pictures too.", panel=STORED)
    ] = False,
    no_codec: Annotated[
        bool, _option("Put no copy of the codec into the store.", "--no-codec", panel=STORED)
    ] = False,
    shard_size: Annotated[int, _option("Pictures of a shard.", panel=STORED)] = 1024,
    check: Annotated[
        int, _option("Pictures that are decoded again, to measure the loss.", panel=STORED)
    ] = 16,
    image_column: Annotated[str | None, _option("Column with the pictures.", panel=SOURCE)] = None,
    caption_column: Annotated[str | None, _option("Column with the captions.", panel=SOURCE)] = None,
    label_column: Annotated[str | None, _option("Column with whole numbers.", panel=SOURCE)] = None,
    subset: Annotated[str | None, _option("Subset of the data set.", panel=SOURCE)] = None,
    split: Annotated[str, _option("Split of the data set.", panel=SOURCE)] = "train",
    device: Annotated[
        str | None, _option("cpu or cuda; by default a GPU where there is one.", panel=RUN)
    ] = None,
    batch: Annotated[int, _option("Pictures encoded at once; 0: by their size.", panel=RUN)] = 0,
    precision: Annotated[
        str | None, _option("float32 or bfloat16; by default what the machine is fast in.", panel=RUN)
    ] = None,
    threads: Annotated[
        int | None, _option("Threads of the model on a CPU; by default the cores.", panel=RUN)
    ] = None,
    workers: Annotated[
        int | None, _option("Processes that decode pictures; by default the cores.", panel=RUN)
    ] = None,
    rank: Annotated[
        int | None, _option("This process, counted from 0; else from the launcher.", panel=RUN)
    ] = None,
    world: Annotated[int | None, _option("Number of processes; else from the launcher.", panel=RUN)] = None,
    engine: Annotated[str, _option("local or ray.", panel=RUN)] = "local",
    dry_run: Annotated[
        bool, _option("Say what would be done, and do nothing.", "--dry-run", panel=RUN)
    ] = False,
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
    # Threads of the model that wait shall sleep: spinning, they would hold up the workers that decode pictures. OpenMP
    # reads this when PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from latentcodec.codec import LatentCodec
    from latentcodec.store.items import Columns
    from latentcodec.store.job import encode as encode_shards
    from latentcodec.store.job import missing_shards, prepare
    from latentcodec.store.ranks import rank_and_world

    if engine not in ("local", "ray"):
        raise ValueError(f"--engine {engine}: local or ray")
    begun = time.monotonic()
    model = LatentCodec.from_pretrained(codec)
    plan = prepare(
        sources, out, model, size=size, area=area, multiple=multiple, min_side=min_side, dtype=dtype,
        posterior="mean and std" if std else "mode", mirrored=mirrored, shard_size=shard_size, sampled=check,
        columns=Columns(image_column, caption_column, label_column, subset, split), device=device, batch=batch,
        threads=threads, precision=precision, keep_codec=not no_codec, save=not dry_run,
    )  # fmt: skip
    if dry_run:
        return _estimate(plan, model, out, as_json)
    told_rank, told_world = rank_and_world()
    rank, world = told_rank if rank is None else rank, told_world if world is None else world
    pictures = sum(plan.rows(shard) for shard in missing_shards(out, plan)[rank::world])
    with counting(pictures, "pictures") as advance:
        if engine == "ray":
            from latentcodec.store.ray import encode_with_ray

            job = encode_with_ray(out, codec if no_codec else None, progress=advance)
        else:
            job = encode_shards(out, model, rank, world, device, workers, advance)
    return report(job, out, time.monotonic() - begun, world, as_json)


def report(job: Job, out: Path, seconds: float, world: int, as_json: bool) -> int:
    """Says what was done; the exit code."""
    encoded = sum(receipt.rows for receipt in job.receipts if receipt.written)
    rejected = sum(receipt.rejected for receipt in job.receipts)
    line: dict[str, Any] = {"items": encoded, "rejected": rejected, "seconds": round(seconds, 2)}
    line["images_per_second"] = round(encoded / seconds, 3)
    if job.index is None:
        print(f"{encoded:,} pictures encoded by this process; others have shards of {out} to do")
        say_json(as_json, line)
        return DONE
    index, samples = job.index, job.index.samples
    print(f"{encoded:,} pictures encoded, {encoded / seconds:.1f}/s")
    print(f"{out}: {index.items:,} pictures, {index.rejected:,} left out; {index.bits_per_value:.2f} bits a value, "
          f"{index.bytes_per_picture:,.0f} bytes a picture")  # fmt: skip
    if samples:
        lowest, dtype = samples["lowest"], index.settings.dtype
        print(f"decoded: {samples['psnr']:.2f} dB PSNR; {dtype} costs {samples['loss']:.4f} dB of it")
        if lowest["psnr"] < samples["psnr"] - FAR_BELOW:
            warn(f"{lowest['path']}: decoded at {lowest['psnr']:.1f} dB, far below the mean of the sample")
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


def _estimate(plan: Plan, codec: LatentCodec, out: Path, as_json: bool) -> int:
    """Says what encoding would do: pictures, buckets, bytes, and the time by one batch that is encoded now."""
    from latentcodec.store.estimate import estimate

    found = estimate(plan, codec, out)
    print(f"{found.pictures:,} pictures in {found.shards:,} shards, {found.rejected:,} left out")
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
