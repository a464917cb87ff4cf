"""`latentcodec inspect`: the facts about a codec or a store, and with images what a codec's latents are fit for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentcodec.cli.output import DONE, LOOK, Device, Json, counting, say_json, warn

if TYPE_CHECKING:
    from latentcodec.codec import LatentCodec
    from latentcodec.store import LatentStore


def inspect(
    subject: Annotated[
        str, typer.Argument(metavar="CODEC_OR_STORE", help="A codec, or the folder of a store.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images: judge the codec's latents on them. Subfolders are labels."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the page and the JSON it is made from.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Images to look at; default: as many as two minutes allow.")
    ] = None,
    beside: Annotated[
        str | None, typer.Option(help="Another codec, whose pictures the page compares with this one's.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> int:
    """Say what a codec is, or what a store holds; with --images, what the codec's latents are fit for.

    latentcodec inspect photo-f8c16 --images photos --out inspected

    latentcodec inspect latents
    """
    from latentcodec.store.format import INDEX

    if images is not None:
        return look(subject, images, out, count, beside, device, as_json)
    for option, value in (("--out", out), ("--count", count), ("--beside", beside), ("--device", device)):
        if value is not None:
            raise ValueError(f"{option} {value}: needs --images, the folder to judge the codec on")
    if Path(subject, INDEX).is_file() or Path(subject, "plan").is_dir():
        from latentcodec.store import LatentStore

        facts = store_facts(LatentStore(subject))
    else:
        from latentcodec.codec import LatentCodec

        facts = codec_facts(LatentCodec.from_pretrained(subject))
    _print(facts)
    say_json(as_json, facts)
    return DONE


def look(
    source: str,
    images: Path,
    out: Path | None,
    count: int | None,
    beside: str | None,
    device: str | None,
    as_json: bool,
) -> int:
    """Measure the codec's latents on `images`, print the verdicts, and write page and result where `out` is given."""
    from latentcodec.codec import LatentCodec, run_compiled
    from latentcodec.machine import usable_device, use_cores
    from latentcodec.report import inspection
    from latentcodec.report.build import write_result
    from latentcodec.report.results import print_threads, require_folder, stem

    print_threads(use_cores())
    place = usable_device(device)
    codec = run_compiled(LatentCodec.from_pretrained(source, device=place))
    if out is not None:
        require_folder(out)
    other = None
    if beside is not None:
        other = beside, run_compiled(LatentCodec.from_pretrained(beside, device=place))
    if other is not None and other[1].image_channels != codec.image_channels:
        raise ValueError(
            f"--beside {beside}: takes images of {other[1].image_channels} channels, {source} of {codec.image_channels}"
        )
    looked = inspection.open_images(images, codec.image_channels, codec.downsampling_factor, count)
    for reason in looked.left_out:
        warn(f"left out: {reason}")
    with counting(inspection.total_passes(looked, codec), "image pass") as advance:
        data = inspection.inspect_codec(codec, source, images, looked, lambda done: advance(done, 0), other)
    print("\n".join(verdict_lines(data)))
    if out is not None:
        files = write_result(data, out, stem([source], data["hardware"], "inspect"))
        print(f"page: {files['html']}\nresult: {files['json']}")
    say_json(as_json, {key: data[key] for key in ("verdicts", "measures", "channels")})
    return LOOK if looked.left_out else DONE


def verdict_lines(data: dict[str, Any]) -> list[str]:
    """The three headlines, each with its reasons and what would change them."""
    from latentcodec.report.page import LEVELS
    from latentcodec.report.pages.inspection import TITLES

    lines = []
    for key, verdict in data["verdicts"].items():
        word, icon = LEVELS[verdict["level"]]
        lines.append(f"{icon} {TITLES[key]}: {word.upper()}")
        for reason in verdict["reasons"]:
            lines += [
                f"    {LEVELS[reason['level']][1]} {reason['text']}",
                f"      to change it: {reason['cure']}",
            ]
        lines += [f"    {LEVELS['note'][1]} {note['text']}" for note in verdict["notes"]]
    return lines


def codec_facts(codec: LatentCodec) -> dict[str, Any]:
    """Architecture, size, shapes, normalisation and identity of a codec."""
    from latentcodec.store.normalisation import normalisation_of

    config, f, c = codec.vae.config, codec.downsampling_factor, codec.latent_channels
    pixels = codec.image_channels * f * f
    return {
        "class": type(codec.vae).__name__,
        "parameters": sum(parameter.numel() for parameter in codec.vae.parameters()),
        "widths": codec.family.widths(config),
        "image_channels": codec.image_channels,
        "latent": f"[{c}, H/{f}, W/{f}]",
        "numbers": f"{pixels} of a picture become {c}: {pixels / c:.0f} to 1",
        "normalisation": normalisation_of(codec),
        "safe_in_float16": None if config.get("force_upcast") is None else not config["force_upcast"],
        "fingerprint": codec.fingerprint,
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
        if name == "samples":
            value = _decoded(value)
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        print(f"{name.replace('_', ' '):{width}}  {value}")


def _decoded(samples: dict[str, Any]) -> str:
    """What the pictures that were decoded again while the store was written said, in words."""
    if not samples:
        return "no picture was decoded again"
    lowest = samples["lowest"]
    return (
        f"{samples['pictures']} pictures decoded again: {samples['psnr']:.2f} dB, of which rounding takes "
        f"{samples['loss']:.4f}; lowest {lowest['psnr']:.2f} dB, {lowest['path']}"
    )
