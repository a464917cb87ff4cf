"""`latentcodec finish`: the index of a store that several processes have encoded, and pictures taken out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentcodec.cli.output import DONE, LOOK, Json, counting, number_of, say_json


def finish(
    store: Annotated[Path, typer.Argument(help="Folder of the store.")],
    drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Remove a picture for good, by its id or by source/id. Can be given several times."
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check every shard, write the index, and list what was left out in rejects.jsonl.

    The last process of `latentcodec encode` does this by itself. Exit code 3 where pictures were left out.

        latentcodec finish latents

        latentcodec finish latents --drop holiday/0042.jpg
    """
    from latentcodec.store import finish as finish_store
    from latentcodec.store.plan import Plan

    with counting(len(Plan.load(store).shards), "shard") as advance:
        index = finish_store(store, drop or (), lambda done, total: advance(1, 0))
    pictures, shards = number_of(index.items, "picture"), number_of(len(index.shards), "shard")
    print(f"{store}: {pictures} in {shards}, {index.rejected:,} left out")
    say_json(
        as_json,
        {
            "items": index.items,
            "rejected": index.rejected,
            "dropped": len(index.dropped),
            "fingerprint": index.settings.codec,
        },
    )
    return LOOK if index.rejected else DONE
