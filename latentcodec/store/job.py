"""One encoding from beginning to end, for one process or one of many: plan, this process' shards, index.

    plan = prepare(["photos"], "latents", "photo-f8c16", size=512)
    encode("latents")

Processes need no coordination: each makes the same plan or finds it made, takes every world-th shard, and whoever sees
that all shards are there writes the index. A killed one is started again, with any number of processes.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._triton import has_triton

from latentcodec.codec import LatentCodec
from latentcodec.files import write_new
from latentcodec.machine import DTYPES, OVERRIDE, fast_dtype, is_fast, physical_cores, usable_device
from latentcodec.ops.native.build import library
from latentcodec.store.codec_copy import put_codec, require_no_other_codec
from latentcodec.store.decoding import naming_lost_workers
from latentcodec.store.encoding import OF_TORCH, Receipt, ShardEncoder
from latentcodec.store.finishing import Unfinished, finish
from latentcodec.store.format import CODEC, Index, Settings, StoreError
from latentcodec.store.items import CAPTIONS_FROM_FILES, Columns
from latentcodec.store.locks import rank_lock
from latentcodec.store.normalisation import normalisation_of
from latentcodec.store.picture import checked_sizes
from latentcodec.store.plan import PLAN_FOLDER, Plan
from latentcodec.store.planning import make_plan
from latentcodec.store.quantize import TORCH
from latentcodec.store.ranks import rank_and_world

BATCH_PIXELS = {"cpu": 1 << 21, "cuda": 1 << 23}  # 8 pictures of 512 x 512, or 32
DECODERS = 8  # worker processes at most, unless more are asked for


@dataclass(frozen=True)
class Job:
    """What `encode` did in this process."""

    receipts: list[Receipt]
    index: Index | None
    """Of the finished store; None while other processes still have shards to do."""


def prepare(
    sources: Sequence[str],
    out: str | Path,
    codec: LatentCodec | str,
    *,
    size: int | None = None,
    area: int | None = None,
    multiple: int | None = None,
    min_side: int = 0,
    dtype: str = "float16",
    posterior: str = "mode",
    mirrored: bool = False,
    captions: str | None = CAPTIONS_FROM_FILES,
    columns: Columns = Columns(),  # noqa: B008 - immutable
    shard_size: int = 1024,
    sampled: int = 16,
    device: str | None = None,
    batch: int = 0,
    threads: int | None = None,
    precision: str | None = None,
    imported: str | None = None,
    keep_codec: bool = True,
    save: bool = True,
    elsewhere: bool = False,
) -> Plan:
    """The plan for encoding `sources` into the store `out`, saved there together with the codec.

    A store that is there is gone on with: an unfinished one with the shards that are missing, a finished one with the
    pictures that it does not have. `imported`: `raw` or `normalised`, where `sources` are folders of another program's
    files of latents. `elsewhere`: other machines encode, as those of Ray do, and a GPU need not be on this one. Raises
    StoreError where it was begun with other settings, or the folder holds somebody else's `codec`, and ValueError for
    settings or sources that do not fit.
    """
    out = Path(out).expanduser()
    model = codec if isinstance(codec, LatentCodec) else LatentCodec.from_pretrained(codec)
    f = model.downsampling_factor
    size, area, multiple = checked_sizes(f, size, area, multiple)
    settings = Settings(
        codec=model.fingerprint, latent_channels=model.latent_channels, downsampling_factor=f,
        image_channels=model.image_channels, size=size, area=area, multiple=multiple, min_side=min_side, dtype=dtype,
        posterior=posterior, mirrored=mirrored, captions=columns.caption or captions, label=columns.label,
        imported=imported,
    )  # fmt: skip
    _check_choices(settings, precision)
    _check_numbers(min_side=min_side, shard_size=shard_size, check=sampled, batch=batch, threads=threads)
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: is a file; a store is a folder")
    has_codec = (out / CODEC).exists()  # asked before the plan, which other processes save before the codec
    before = Plan.load(out) if any((out / PLAN_FOLDER).glob("[0-9]*.arrow")) else None
    if before is None and has_codec and keep_codec:
        require_no_other_codec(model, out)
    told = [_told(source) for source in sources]
    if before is not None and _is_gone_on_with(out, before, settings, told, columns, elsewhere):
        if save and keep_codec:
            put_codec(model, out)
        return before
    machine = _machine(device, batch, threads, precision, elsewhere)
    plan = make_plan(told, settings, machine, columns, shard_size, sampled, normalisation_of(model), before)
    if save:
        if plan is not before:
            plan = _published(plan, out, elsewhere)
        if keep_codec:  # once the plan says which codec it is
            put_codec(model, out)
    return plan


def encode(
    out: str | Path,
    codec: LatentCodec | str | None = None,
    rank: int | None = None,
    world: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Job:
    """Encodes this process' shards of a store that `prepare` has planned; the last one writes the index.

    `rank`, `world`: this process and their number, by default from the environment of torchrun, accelerate or SLURM
    (array jobs included). `workers`: processes that decode, by default the CPU's cores. `progress(encoded, rejected)`
    is called after each batch.
    """
    out = Path(out).expanduser()
    rank, world = rank_and_world(rank=rank, world=world)
    encoder = ShardEncoder(
        out, codec, device, min(DECODERS, physical_cores()) if workers is None else workers
    )
    with rank_lock(out, rank, world), naming_lost_workers():
        receipts = list(encoder.run(encoder.plan.shards[rank::world], progress))
    try:
        index = None if missing_shards(out, encoder.plan) else finish(out)
    except Unfinished:  # another process has added pictures meanwhile
        index = None
    return Job(receipts, index)


def missing_shards(out: Path, plan: Plan) -> list[int]:
    """The numbers of the shards that are not there yet."""
    return [shard for shard in plan.shards if not (out / plan.file(shard)).is_file()]


def _check_choices(settings: Settings, precision: str | None) -> None:
    """Raises ValueError for a word that is none of those to choose from."""
    if settings.dtype not in TORCH:
        raise ValueError(f"--dtype {settings.dtype}: latents are stored as {', '.join(TORCH)}")
    if settings.imported not in (None, "raw", "normalised"):
        raise ValueError(f"--latents {settings.imported}: give raw or normalised")
    if settings.posterior not in ("mode", "mean and std"):
        raise ValueError(f"posterior {settings.posterior!r}: 'mode' or 'mean and std'")
    if precision not in (None, *DTYPES):
        raise ValueError(f"--precision {precision}: give {' or '.join(DTYPES)}")


def _check_numbers(**numbers: int | None) -> None:
    """Raises ValueError for a number that is too small; None is the default and stands."""
    for name, value in numbers.items():
        least = 1 if name in ("shard_size", "threads") else 0
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least {least}")


def _told(source: str) -> str:
    """How the plan names a source: its whole path, where it is a file or folder."""
    path = os.path.expanduser(source)
    return os.path.abspath(path) if os.path.exists(path) else source


def _is_gone_on_with(
    out: Path, begun: Plan, settings: Settings, sources: list[str], columns: Columns, elsewhere: bool
) -> bool:
    """Whether a store that was begun has shards to do, before pictures are added to it.

    Raises StoreError where it was begun with other settings, or is not finished and was begun with other sources, or
    other columns or another split of them.
    """
    if differences := begun.settings.differences(settings):
        raise StoreError(f"{out}: this store was begun with {'; '.join(differences)}")
    if not missing_shards(out, begun):
        return False
    if (planned := begun.parts[-1].about["sources"]) != sources:
        raise StoreError(
            f"{out}: this store is not finished. Finish it first, with the sources {', '.join(planned)}; then other "
            "pictures can be added"
        )
    for name, value in columns._asdict().items():
        if (begun_with := begun.parts[-1].about["columns"][name]) != value:
            raise StoreError(
                f"{out}: this store is not finished. Finish it first, with the {name} {begun_with!r} that it was begun "
                f"with, not {value!r}"
            )
    if not elsewhere:
        _say_what_differs(out, begun)
    return True


def _say_what_differs(out: Path, plan: Plan) -> None:
    """Warns of what is other here than where the newest part of the plan was made, and changes the last bits."""
    machine = plan.parts[-1].machine
    functions = machine.get("functions", OF_TORCH)  # earlier plans know none
    here = {"torch": torch.__version__, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    if machine["device"] == "cpu":
        here = {"torch": torch.__version__, "functions": _functions("cpu", DTYPES[machine["precision"]])}
    elif here["device"] == "cuda" and functions != OF_TORCH:  # those of torch are kept
        here["functions"] = _functions("cuda", DTYPES[machine["precision"]])
    for name, value in here.items():
        if (begun_with := functions if name == "functions" else machine[name]) != value:
            warnings.warn(
                f"{out} was begun with {name} {begun_with}, here it is {value}: the last bits of the latents will "
                "differ between its shards",
                stacklevel=4,
            )


def _machine(
    device: str | None, batch: int, threads: int | None, precision: str | None, elsewhere: bool
) -> dict[str, Any]:
    """How this part of the store is encoded, on this machine or `elsewhere`, and wherever it is gone on with."""
    is_theirs = elsewhere and re.fullmatch(r"cuda(:[0-9]+)?", device or "")
    chosen = "cuda" if is_theirs else usable_device(device).type
    if precision is None and is_theirs and not torch.cuda.is_available() and not os.environ.get(OVERRIDE):
        precision = "bfloat16"  # for which GPUs have units since 2020
    dtype = fast_dtype(chosen) if precision is None else DTYPES[precision]
    return {
        "device": chosen,
        "precision": str(dtype).removeprefix("torch."),
        "batch": batch,
        "batch_pixels": BATCH_PIXELS.get(chosen, BATCH_PIXELS["cpu"]),
        "threads": physical_cores() if threads is None else threads,
        "torch": torch.__version__,
        "functions": _functions(chosen, dtype),
    }


def _functions(device: str, dtype: torch.dtype) -> str:
    """Whose functions encode there: on GPUs Triton's, on CPUs in float32 native ones, which are waited for."""
    if device == "cuda":
        is_there = has_triton() or not torch.cuda.is_available()  # as on the other machines that are meant
        return "Triton's" if is_there else OF_TORCH
    is_float32 = dtype == torch.float32 or not is_fast(dtype)  # what is emulated is computed in float32
    return "native" if device == "cpu" and is_float32 and library() is not None else OF_TORCH


def _published(plan: Plan, out: Path, elsewhere: bool) -> Plan:
    """Saves the newest part of a plan, or takes the one that another process has saved of the same pictures.

    That one may be of a machine with other cores or another compiler: all encode as it says.
    """
    part = plan.parts[-1]
    path = out / PLAN_FOLDER / f"{len(plan.parts) - 1:04}.arrow"
    if write_new(path, part.to_bytes()):
        return plan
    theirs = Plan.load(out)
    same = theirs.parts[: len(plan.parts)]
    if not same[-1].asks_for_the_same_as(part):
        raise StoreError(
            f"{out}: another process has begun to encode other pictures, or with other settings, into this store"
        )
    if not elsewhere:
        _say_what_differs(out, Plan(same))
    return theirs
