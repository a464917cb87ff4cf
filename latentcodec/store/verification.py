"""Whether a store is what its index says: every byte by the shard's digest, every row by its own checksum,
the codec by its fingerprint and the plan by its digest.

The digest (sha256) says that a shard is damaged, the checksums which of its pictures are. What to do is said by whoever
asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from latentcodec.files import open_regular
from latentcodec.printable import UNDECODED
from latentcodec.store.format import CODEC, Index, ShardEntry, StoreError
from latentcodec.store.plan import PLAN_FOLDER, Plan
from latentcodec.store.read import LatentStore
from latentcodec.store.shard import Shard

BLOCK_BYTES = 1 << 20


@dataclass
class Verification:
    """What `verify` found."""

    items: int
    """Rows that the index counts."""
    bad_shards: dict[str, list[str]] = field(default_factory=dict)
    """File of a shard -> what is wrong with it, the damaged pictures by name."""
    bad_folders: dict[str, str] = field(default_factory=dict)
    """`codec` or `plan` -> what is wrong with it."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad_shards and not self.bad_folders


def verify(store: str | Path, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Reads the whole store, its codec and its plan too, and compares it with its index.

    `progress(done, shards)` is called after each shard. Raises StoreError where there is no index or it is damaged.
    """
    store = Path(store)
    index = Index.load(store)
    result = Verification(index.items, bad_folders=_bad_folders(store, index))
    for done, entry in enumerate(index.shards, 1):
        problems = shard_problems(store, index, entry)
        if problems:
            result.bad_shards[entry.file] = problems
        if progress is not None:
            progress(done, len(index.shards))
    return result


def _bad_folders(store: Path, index: Index) -> dict[str, str]:
    """What is wrong with the copy of the codec, where there is one, and with a plan whose parts the index knows."""
    bad: dict[str, str] = {}
    can_be_opened = not UNDECODED.search(str(store))  # else no library opens weights there
    if (store / CODEC).is_dir() and can_be_opened:
        try:
            LatentStore(store).codec()
        except (ValueError, OSError) as error:
            bad[CODEC] = f"{store / CODEC}: not the codec of these latents ({error})"
    try:
        if (parts := len(index.machine)) and parts > len(Plan.load(store).parts):
            raise StoreError(
                f"{store / PLAN_FOLDER}: the index knows {parts} parts of the plan, some are missing"
            )
    except StoreError as error:
        bad[PLAN_FOLDER] = str(error)
    return bad


def shard_problems(store: Path, index: Index, entry: ShardEntry) -> list[str]:
    """What is wrong with one shard; nothing where all of it is right."""
    path = store / entry.file
    try:
        digest = sha256_of(path)
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    if digest == entry.sha256:
        return []
    try:
        shard = Shard(path, index.settings, entry.shape, entry.items)
    except StoreError as error:
        return [str(error)]
    damaged = [f"{path}: item {row} ({shard.text(row, 'id')}) is damaged" for row in damaged_rows(shard)]
    return damaged or [f"{path}: its digest is not the one in the index, though every picture is intact"]


def damaged_rows(shard: Shard) -> list[int]:
    """The rows whose checksum does not fit."""
    return [row for row in range(len(shard)) if not shard.is_intact(row)]


def checked_entry(store: Path, shard: Shard) -> ShardEntry:
    """The index's entry of a shard whose rows are all intact. Raises StoreError naming the first that is not."""
    if damaged := damaged_rows(shard):
        raise StoreError(
            f"{shard.path}: item {damaged[0]} ({shard.text(damaged[0], 'id')}) is damaged; delete this shard and "
            "run the same `latentcodec encode` again"
        )
    file = shard.path.relative_to(store).as_posix()
    return ShardEntry(file, len(shard), shard.shape, shard.path.stat().st_size, sha256_of(shard.path))


def sha256_of(path: Path) -> str:
    """The digest of a file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
