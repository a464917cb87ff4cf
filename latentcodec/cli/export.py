"""`latentcodec export`: a store as parquet files or WebDataset tars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentcodec.cli.output import DONE, Json, counting, number_of, say_json


def export(
    store: Annotated[Path, typer.Argument(help="Folder of the store.")],
    to: Annotated[str, typer.Option(help="parquet or webdataset.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files.", show_default=False)],
    as_json: Json = False,
) -> int:
    """Write a store in another format, one file for each shard.

    The shards are Arrow files, which pyarrow, `datasets` and polars read as they are; this is for tools that do not.
    Run again, it writes the files anew whose shards have changed; beside each tar a .json says of which shard it is.

        latentcodec export latents --to parquet --out latents-parquet
    """
    from latentcodec.store import LatentStore
    from latentcodec.store.export import export as export_store

    opened = LatentStore(store)
    with counting(sum(entry.items > 0 for entry in opened.index.shards), "shard") as advance:
        files = export_store(opened, to, out, lambda done, total: advance(1, 0))
    print(f"{number_of(len(opened), 'picture')} in {number_of(len(files), f'{to} file')}: {out}")
    say_json(as_json, {"items": len(opened), "files": len(files)})
    return DONE
