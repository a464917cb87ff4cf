"""`latentcodec verify`: whether a store is what its index says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentcodec.cli.output import DONE, LOOK, Json, counting, number_of, say_json


def verify(
    store: Annotated[Path, typer.Argument(help="Folder of the store.")],
    as_json: Json = False,
) -> int:
    """Read every byte of a store and name what is damaged: the shard and the pictures, the codec, the plan.

    Exit code 3 where something is. A damaged shard is mended by deleting it and running the same `latentcodec encode`
    again, which replaces a damaged codec too.

        latentcodec verify latents
    """
    from latentcodec.store import verify as verify_store
    from latentcodec.store.format import Index

    shards = len(Index.load(store).shards)
    with counting(shards, "shard") as advance:
        result = verify_store(store, lambda done, total: advance(1, 0))
    for problems in result.bad_shards.values():
        for problem in problems:
            print(problem)
    for problem in result.bad_folders.values():
        print(problem)
    damaged = [f"{len(result.bad_shards)} of {number_of(shards, 'shard')}"] if result.bad_shards else []
    verdict = "intact" if result.ok else f"damaged: {', '.join([*damaged, *result.bad_folders])}"
    print(f"{store}: {number_of(result.items, 'picture')} in {number_of(shards, 'shard')}, {verdict}")
    say_json(as_json, {"ok": result.ok, "items": result.items, "bad_shards": sorted(result.bad_shards)})
    return DONE if result.ok else LOOK
