"""The end of an encoding: every shard is checked, dropped pictures are taken out, and the index is written.

Several processes may do this at once, while others add pictures or drop some. Whoever has checked all shards writes the
index only if plan and dropped pictures are still those it began with, and begins again else; so the index that is
written last is of what is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa

from latentcodec.files import locked, read_regular, write_whole
from latentcodec.leftovers import ENDING, is_leftover
from latentcodec.store.format import DROPPED, INDEX, REJECTS, Index, ShardEntry, StoreError
from latentcodec.store.locks import remove_stale_locks
from latentcodec.store.plan import Plan
from latentcodec.store.shard import Shard
from latentcodec.store.verification import checked_entry
from latentcodec.store.write import shard_bytes

Progress = Callable[[int, int], None]  # (shards done, all shards)


class Unfinished(StoreError):
    """Shards of the plan are not there yet."""


def finish(store: str | Path, drop: Iterable[str] = (), progress: Progress | None = None) -> Index:
    """Checks every shard that was written since the last index, takes out dropped rows, and writes the index.

    `drop`: ids of pictures (or `source/id`, where two sources have the same id) to be removed for good; they are not
    encoded again. `progress(done, shards)` is called after each shard. Raises Unfinished naming a shard that is
    missing, and StoreError naming what is damaged, not in the store, or in several sources.
    """
    store = Path(store)
    if names := list(drop):
        _record_drops(store, names)
    while True:
        begun = _state(store)
        try:
            index, rejects = _checked(store, progress)
        except StoreError:
            if _state(store) == begun:
                raise
            continue
        with locked(store):
            if _state(store) == begun:
                write_whole(store / REJECTS, rejects)
                write_whole(store / INDEX, index.to_json())
                break
    _clear_litter(store)
    return index


def _state(store: Path) -> tuple[int, bytes]:
    """What others may change meanwhile: the number of the plan's parts, and the list of dropped pictures."""
    path = store / DROPPED
    return len(Plan.files(store)), read_regular(path) if path.is_file() else b""


def _checked(store: Path, progress: Progress | None) -> tuple[Index, bytes]:
    """The index of what is there, and the content of rejects.jsonl."""
    plan, dropped = Plan.load(store), _read_drops(store / DROPPED)
    missing = [number for number in plan.shards if not (store / plan.file(number)).is_file()]
    if missing:
        raise Unfinished(
            f"{store}: {len(missing)} of {len(plan.shards)} shards are missing, the first is "
            f"{plan.file(missing[0])}: run the same `latentcodec encode` again"
        )
    known = _known_entries(store)
    entries, rejects, samples = [], plan.rejects(), []
    for number, shard in _finished_shards(store, plan, dropped):
        _require_planned(plan, number, shard, dropped)
        entries.append(known(shard) or checked_entry(store, shard))
        rejects += [{**reject, "shard": plan.file(number)} for reject in shard.about["rejects"]]
        samples += shard.about["samples"]
        if progress is not None:
            progress(len(entries), len(plan.shards))
    index = Index(
        plan.settings, plan.normalisation, entries, len(rejects), sorted(dropped),
        _summary(samples), [part.machine for part in plan.parts],
    )  # fmt: skip
    return index, "".join(json.dumps(reject, sort_keys=True) + "\n" for reject in rejects).encode()


def _known_entries(store: Path) -> Callable[[Shard], ShardEntry | None]:
    """Gives the entry that the index has of a shard; None of one that was written since, or is not as it says."""
    try:
        entries = {entry.file: entry for entry in Index.load(store).shards}
        written = (store / INDEX).stat().st_mtime_ns
    except (StoreError, OSError):
        entries, written = {}, 0

    def known(shard: Shard) -> ShardEntry | None:
        entry, file = entries.get(shard.path.relative_to(store).as_posix()), shard.path.stat()
        if entry is None or file.st_mtime_ns >= written:
            return None
        return entry if (entry.bytes, entry.items) == (file.st_size, len(shard)) else None

    return known


def _finished_shards(store: Path, plan: Plan, dropped: set[str]) -> Iterable[tuple[int, Shard]]:
    """Every shard, opened; those that hold a dropped row are written anew without it."""
    for number in plan.shards:
        path = store / plan.file(number)
        shard = Shard(path, plan.settings, plan.shape(number))
        if dropped:
            keys = [f"{source}\t{name}" for source, name in shard.pictures()]
            kept = [row for row, key in enumerate(keys) if key not in dropped]
            if len(kept) < len(shard):
                about = {k: v for k, v in shard.about.items() if k not in ("format", "version")}
                write_whole(path, shard_bytes(shard.batch.take(pa.array(kept, pa.int64())), about))
                shard = Shard(path, plan.settings, plan.shape(number))
        yield number, shard


def _require_planned(plan: Plan, number: int, shard: Shard, dropped: set[str]) -> None:
    """Raises StoreError where a shard holds, with what it left out, other pictures than the plan gave it."""
    planned = [picture.entry for picture in plan.pictures(number, 0, plan.rows(number))]
    left_out = {reject["path"] for reject in shard.about["rejects"]}
    wanted = [(entry.source, entry.id) for entry in planned
              if entry.path not in left_out and f"{entry.source}\t{entry.id}" not in dropped]  # fmt: skip
    if shard.pictures() != wanted:
        raise StoreError(
            f"{shard.path}: holds other pictures than the plan gave this shard, as one of another store does; delete "
            "it and run the same `latentcodec encode` again"
        )


def _record_drops(store: Path, names: list[str]) -> None:
    """Adds pictures to the list of dropped ones, which is on the disk before any shard is touched."""
    found = Plan.load(store).find(names)
    for name in names:
        if name not in found:
            raise StoreError(f"{store}: no picture {name!r} in this store (--drop)")
        whole = sorted({f"{source}/{picture}" for source, picture in found[name]})
        if len(whole) > 1:
            raise StoreError(
                f"{store}: {name!r} is in {len(whole)} sources; name it with its source, as {', '.join(whole[:4])} "
                "(--drop)"
            )
    keys = {f"{source}\t{picture}" for pictures in found.values() for source, picture in pictures}
    path = store / DROPPED
    with locked(store):  # or one of two processes would undo what the other added
        dropped = _read_drops(path) | keys
        write_whole(path, (json.dumps(sorted(dropped), indent=1) + "\n").encode())


def _read_drops(path: Path) -> set[str]:
    """`source` and `id`, joined by a tab, of the pictures that were dropped."""
    if not path.is_file():
        return set()
    try:
        keys = json.loads(read_regular(path))
        if not isinstance(keys, list) or not all(isinstance(key, str) and "\t" in key for key in keys):
            raise ValueError("no list of sources and ids")
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path}: damaged ({error}); bring it back from a copy, or delete it and name the pictures again (--drop)"
        ) from error
    return set(keys)


def _summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over the sampled pictures, dB."""
    if not samples:
        return {}
    stored, exact = (fmean(s[name] for s in samples) for name in ("psnr", "psnr_before_rounding"))
    return {
        "pictures": len(samples),
        "psnr": round(stored, 4),
        "psnr_before_rounding": round(exact, 4),
        "loss": round(exact - stored, 4),
        "lowest": min(({"psnr": s["psnr"], "path": s["path"]} for s in samples), key=lambda s: s["psnr"]),
    }


def _clear_litter(store: Path) -> None:
    """Removes what processes left that were killed while they wrote, and their locks; those at work keep theirs."""
    for folder, folders, files in os.walk(store):  # which forgives what vanishes meanwhile
        for path in (Path(folder, name) for name in (*folders, *files) if name.startswith(".")):
            if path.suffix != ENDING or not is_leftover(path):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    remove_stale_locks(store)
