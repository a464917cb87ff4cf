"""`latentcodec inspect`: the facts about a codec, or about a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentcodec.cli.output import DONE, Json, say_json

if TYPE_CHECKING:
    from latentcodec.codec import LatentCodec
    from latentcodec.store import LatentStore


def inspect(
    subject: Annotated[
        str, typer.Argument(metavar="CODEC_OR_STORE", help="A codec, or the folder of a store.")
    ],
    as_json: Json = False,
) -> int:
    """Say what a codec is, or what a store holds.

    latentcodec inspect photo-f8c16

    latentcodec inspect latents
    """
    from latentcodec.store.format import INDEX

    if Path(subject, INDEX).is_file() or Path(subject, "plan").is_dir():
        from latentcodec.store import LatentStore

        facts = store_facts(LatentStore(subject))
    else:
        from latentcodec.codec import LatentCodec

        facts = codec_facts(LatentCodec.from_pretrained(subject))
    _print(facts)
    say_json(as_json, facts)
    return DONE


def codec_facts(codec: LatentCodec) -> dict[str, Any]:
    """Architecture, size, shapes, normalisation and identity of a codec."""
    from latentcodec.store.identity import fingerprint_of, normalisation_of

    config, f, c = codec.vae.config, codec.downsampling_factor, codec.latent_channels
    pixels = codec.image_channels * f * f
    return {
        "class": type(codec.vae).__name__,
        "parameters": sum(parameter.numel() for parameter in codec.vae.parameters()),
        "widths": list(config.get("block_out_channels") or ()),
        "image_channels": codec.image_channels,
        "latent": f"[{c}, H/{f}, W/{f}]",
        "numbers": f"{pixels} of a picture become {c}: {pixels / c:.0f} to 1",
        "normalisation": normalisation_of(codec),
        "safe_in_float16": None if config.get("force_upcast") is None else not config["force_upcast"],
        "fingerprint": fingerprint_of(codec),
    }


def store_facts(store: LatentStore) -> dict[str, Any]:
    """Counts, sizes, settings and what was measured."""
    from latentcodec.store.histogram import channel_statistics

    index, settings = store.index, store.index.settings
    return {
        "items": index.items,
        "rejected": index.rejected,
        "dropped": len(index.dropped),
        "shards": len(index.shards),
        "bytes": sum(entry.bytes for entry in index.shards),
        "bytes_per_picture": round(index.bytes_per_picture, 1),
        "bits_per_value": round(index.bits_per_value, 3),
        "shapes": {"x".join(map(str, shape)): count for shape, count in store.shapes.items()},
        "dtype": settings.dtype,
        "posterior": settings.posterior,
        "mirrored": settings.mirrored,
        "size": settings.size or settings.area or "as it is",
        "samples": index.samples,
        "fingerprint": settings.codec,
        **channel_statistics(store),
    }


def _print(facts: dict[str, Any]) -> None:
    """One fact a line."""
    width = max(map(len, facts))
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        print(f"{name.replace('_', ' '):{width}}  {value}")
