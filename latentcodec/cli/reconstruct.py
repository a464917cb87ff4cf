"""`latentcodec reconstruct`: what a codec keeps of a picture, and what it loses."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from latentcodec.cli.output import DONE, LOOK, Codec, Json, say_json, warn

AMPLIFIED = 4  # times, of the difference that is shown


def reconstruct(
    pictures: Annotated[list[str], typer.Argument(help="Image files, or folders of them.")],
    codec: Codec,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A .png, .jpg or .webp file, or a folder.", show_default=False)
    ],
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    as_json: Json = False,
) -> int:
    """Encode and decode pictures; write input, output and amplified difference side by side.

    Prints PSNR (dB) and SSIM of each picture, by the protocol of the reports: whole picture, 8 bits.

        latentcodec reconstruct photo.jpg --codec photo-f8c16 --out comparison.png
    """
    from latentcodec.codec import LatentCodec
    from latentcodec.pixels import WRITERS, UnreadableImage, image_grid, load_image, save_image
    from latentcodec.printable import existing
    from latentcodec.quality.metrics import psnr, ssim
    from latentcodec.quality.metrics import reconstruct as through
    from latentcodec.store.listing import list_entries

    listed = list_entries(pictures)
    paths = [existing(entry.path) for entry, reason in listed if entry.kind == "file" and reason is None]
    refused = [f"{entry.path}: {reason}" for entry, reason in listed if reason is not None]
    for line in refused:
        warn(f"left out: {line}")
    if not paths:
        raise ValueError(f"{', '.join(pictures)}: no image file among them")
    names = _names(paths, out, tuple(WRITERS))
    model = LatentCodec.from_pretrained(codec, device=device)
    scores, left_out = [], len(refused)
    for path, target in zip(paths, names, strict=True):
        try:
            x = load_image(path, model.image_channels)
        except UnreadableImage as error:
            warn(f"left out: {error}")
            left_out += 1
            continue
        y = through(model, x)
        difference = ((y - x) * AMPLIFIED).clamp(-1, 1)
        save_image(image_grid([x[0], y[0], difference[0]], columns=3), target)
        similarity = ssim(x, y).item() if min(x.shape[-2:]) >= 11 else float("nan")
        scores.append((psnr(x, y).item(), similarity))
        print(f"{path}: {scores[-1][0]:.2f} dB PSNR, {similarity:.4f} SSIM -> {target}")
    if not scores:
        raise ValueError("none of the pictures can be read")
    means = [fmean(column) for column in zip(*scores, strict=True)]
    if len(scores) > 1:
        print(f"mean of {len(scores)}: {means[0]:.2f} dB PSNR, {means[1]:.4f} SSIM")
    say_json(as_json, {"items": len(scores), "rejected": left_out, "psnr": means[0], "ssim": means[1]})
    return LOOK if left_out else DONE


def _names(paths: list[Path], out: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Where each comparison goes.

    Raises ValueError where several would go into one file, or one into a file of a kind that is not written.
    """
    from latentcodec.pixels.containers import PLUGINS
    from latentcodec.pixels.folders import IMAGE_SUFFIXES, OTHER_SUFFIXES

    if out.suffix.lower() in suffixes:
        if len(paths) > 1:
            raise ValueError(f"--out {out}: {len(paths)} pictures need a folder")
        return [out]
    if out.suffix.lower() in {*IMAGE_SUFFIXES, *OTHER_SUFFIXES, *PLUGINS} and not out.is_dir():
        raise ValueError(f"--out {out}: a comparison is written as {', '.join(suffixes)}, or into a folder")
    names = [path.stem for path in paths]
    return [
        out / (f"{path.stem}.png" if names.count(path.stem) == 1 else f"{path.stem}-{number}.png")
        for number, path in enumerate(paths)
    ]
