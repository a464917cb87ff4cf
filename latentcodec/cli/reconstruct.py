"""`latentcodec reconstruct`: what a codec keeps of a picture, and what it loses.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from latentcodec.cli.names import Names, refuse_originals
from latentcodec.cli.output import DONE, LOOK, Codec, Device, Json, say_json, warn

if TYPE_CHECKING:
    from torch import Tensor

    from latentcodec.codec import LatentCodec
    from latentcodec.store.items import Entry

AMPLIFIED = 4  # times, of the difference that is shown


def reconstruct(
    pictures: Annotated[list[str], typer.Argument(help="Image files, folders or .tar files of them.")],
    codec: Codec,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A .png, .jpg or .webp file, or a folder.", show_default=False)
    ],
    device: Device = None,
    as_json: Json = False,
) -> int:
    """Encode and decode pictures; write input, output and amplified difference side by side.

    Prints PSNR (dB) and SSIM of each picture, by the protocol of the reports: whole picture, 8 bits.

        latentcodec reconstruct photo.jpg --codec photo-f8c16 --out comparison.png
    """
    from latentcodec.codec import LatentCodec, run_compiled
    from latentcodec.machine import usable_device
    from latentcodec.pixels import UnreadableImage, decode_image
    from latentcodec.store.items import Columns, EntryReader
    from latentcodec.store.listing import list_entries

    listed = list_entries(pictures)
    entries = [entry for entry, reason in listed if reason is None]
    refused = [f"{entry.path}: {reason}" for entry, reason in listed if reason is not None]
    for line in refused:
        warn(f"left out: {line}")
    targets = _targets(entries, out)
    refuse_originals(targets, (entry.path for entry in entries if entry.kind == "file"))
    reader = EntryReader(Columns(), with_captions=False)
    model = run_compiled(LatentCodec.from_pretrained(codec, device=usable_device(device)))
    scores, left_out = [], len(refused)
    for entry, target in zip(entries, targets, strict=True):
        try:
            x = decode_image(reader.picture(entry), model.image_channels, name=entry.path)[None]
        except UnreadableImage as error:
            warn(f"left out: {error}")
            left_out += 1
            continue
        scores.append(_compare(model, x, target))
        print(f"{entry.path}: {scores[-1][0]:.2f} dB PSNR, {scores[-1][1]:.4f} SSIM -> {target}")
    if not scores:
        raise ValueError("none of the pictures can be read")
    means = [fmean(column) for column in zip(*scores, strict=True)]
    if len(scores) > 1:
        print(f"mean of {len(scores)}: {means[0]:.2f} dB PSNR, {means[1]:.4f} SSIM")
    say_json(as_json, {"items": len(scores), "rejected": left_out, "psnr": means[0], "ssim": means[1]})
    return LOOK if left_out else DONE


def _compare(model: LatentCodec, x: Tensor, target: Path) -> tuple[float, float]:
    """Writes x [1, C, H, W], what comes back of it and the difference; gives PSNR in dB, and SSIM or NaN."""
    from latentcodec.pixels import image_grid, save_image
    from latentcodec.quality.metrics import SSIM_WINDOW, psnr, reconstruct, ssim

    y = reconstruct(model, x)
    difference = ((y - x) * AMPLIFIED).clamp(-1, 1)
    save_image(image_grid([x[0], y[0], difference[0]], columns=3), target)
    similarity = ssim(x, y).item() if min(x.shape[-2:]) >= SSIM_WINDOW else float("nan")
    return psnr(x, y).item(), similarity


def _targets(entries: list[Entry], out: Path) -> list[Path]:
    """Where each comparison goes: named as `latentcodec decode` names pictures, where `out` is a folder.

    Raises ValueError where several would go into one file, or one into a file of a kind that is not written.
    """
    from latentcodec.pixels import WRITERS
    from latentcodec.pixels.containers import PLUGINS
    from latentcodec.pixels.folders import IMAGE_SUFFIXES, OTHER_SUFFIXES

    if out.suffix.lower() in WRITERS:
        if len(entries) > 1:
            raise ValueError(f"--out {out}: {len(entries)} pictures need a folder")
        return [out]
    if out.suffix.lower() in {*IMAGE_SUFFIXES, *OTHER_SUFFIXES, *PLUGINS} and not out.is_dir():
        raise ValueError(f"--out {out}: a comparison is written as {', '.join(WRITERS)}, or into a folder")
    names = Names((entry.source for entry in entries), ".png")
    return [out / names.of(entry.source, entry.id) for entry in entries]
