"""`latentcodec import`: the latent caches of other programs into a store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from latentcodec.cli.encode import report
from latentcodec.cli.output import Codec, Json, counting


def import_caches(
    folders: Annotated[
        list[str], typer.Argument(help="Folders with .npz (kohya) or .pt (SimpleTuner) files.")
    ],
    codec: Codec,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the store.", show_default=False)],
    latents: Annotated[
        str,
        typer.Option(
            help="raw: as the VAE gives them; normalised: scaled and shifted already.", show_default=False
        ),
    ],
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, int8 or float8.")] = "float16",
    shard_size: Annotated[int, typer.Option(help="Pictures of a shard at most.")] = 1024,
    as_json: Json = False,
) -> int:
    """Bring latents that another program has cached into a store.

    The files do not say which codec made them: you do. kohya's sd-scripts write raw latents for SD and SDXL and
    normalised ones for SD3 and FLUX; SimpleTuner writes normalised ones.

        latentcodec import cache --codec stabilityai/sdxl-vae --latents raw --out latents
    """
    from latentcodec.codec import LatentCodec
    from latentcodec.store.job import encode, missing_shards, prepare

    begun = time.monotonic()
    model = LatentCodec.from_pretrained(codec)
    plan = prepare(folders, out, model, dtype=dtype, shard_size=shard_size, sampled=0, imported=latents)
    with counting(sum(plan.rows(shard) for shard in missing_shards(out, plan)), "file") as advance:
        job = encode(out, model, 0, 1, progress=advance)
    return report(job, out, time.monotonic() - begun, 1, as_json)
