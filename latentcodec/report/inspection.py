"""A codec looked at: its health and the pictures that show it, as one JSON result from which a page can be made.

Shapes: N images, C channels, H W pixels, c latent channels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.pixels import UnreadableImage, crop_middle, find_images, load_image
from latentcodec.quality import image_codecs
from latentcodec.quality import latent_measures as latents
from latentcodec.quality.decoder_measures import Inspectable, Progress, decibels, decoded, no_progress
from latentcodec.quality.health import WINDOW, Health, Windows, cut_windows, measure_health, passes
from latentcodec.quality.klt import KLT
from latentcodec.quality.metrics import reconstruct
from latentcodec.report.pictures import channel_picture, principal_colours, tiles, webp
from latentcodec.report.results import provenance, short_path

PIXELS = 128 * 256**2  # of windows that are looked at; a larger folder gives evenly spaced images
MOST_IMAGES = 2000
STRIP = 128  # pixels a side of the small pictures
STRIP_NOISES = (0.0, 0.05, 0.1, 0.2, 0.5)
GRID, SPAN = 31, 3.0  # tiles a side of the decoded plane of 1 x 1 latents, from -3 to 3
CURVE_POINTS = 300  # of each training curve


@dataclass(frozen=True)
class OpenedImages:
    """The images of a folder, ready to be looked at."""

    x: Tensor
    """[N, C, S, S]: their middles."""
    names: list[str]
    labels: list[int] | None
    """By the folder that an image lies in; None where all lie in one."""
    label_names: list[str]
    left_out: list[str]
    """What could not be used, and why."""


def open_images(folder: Path, channels: int, f: int, limit: int | None = None) -> OpenedImages:
    """Evenly spaced images below `folder`, as many as `limit` or as the time allows; labels are names of subfolders.

    Raises ValueError where none can be used.
    """
    paths = find_images(folder)
    count = min(len(paths), limit or MOST_IMAGES)
    images, sides, kept, left_out = [], [], [], []
    budget = float(PIXELS)
    for path in (paths[i * len(paths) // count] for i in _spread(count)):
        try:
            image = load_image(path, channels)[0]
        except UnreadableImage as error:
            left_out.append(str(error))
            continue
        # A hundred photographs as a whole would fill the memory.
        images.append(crop_middle(image, WINDOW).clone())
        sides.append(min(image.shape[-2:]))
        kept.append(path)
        budget -= min(sides[-1], WINDOW) ** 2
        if limit is None and budget < 0:
            break
    if not images:
        raise ValueError(f"none of the {len(paths)} images in {folder} can be used; the first: {left_out[0]}")
    x, numbers = cut_windows(images, f, sides=sides)
    if len(numbers) < len(kept):
        side = x.shape[-1]
        left_out += [
            f"{kept[i]}: smaller than {side} pixels" for i in range(len(kept)) if i not in {*numbers}
        ]
    kept = [kept[number] for number in numbers]
    groups = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in kept]
    label_names = sorted({*groups})
    labels = [label_names.index(group) for group in groups] if len(label_names) > 1 else None
    return OpenedImages(x, [path.name for path in kept], labels, label_names, left_out)


def _spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread evenly: that of a golden ratio step."""
    step = next(step for step in range(max(1, round(count * 0.618)), 2 * count + 2) if _coprime(step, count))
    return [number * step % count for number in range(count)]


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


def inspect_codec(
    codec: LatentCodec,
    source: str,
    folder: Path,
    looked: OpenedImages,
    progress: Progress = no_progress,
    beside: tuple[str, LatentCodec] | None = None,
) -> dict[str, Any]:
    """The result of kind "inspect": verdicts, measures, channels, curves, pictures and where it comes from.

    `beside`: the name of another codec, and the codec, whose pictures can be compared with this one's.
    """
    health, windows = measure_health(codec, looked.x, looked.labels, progress=progress)
    klt = KLT.fit(list(windows.x), codec.downsampling_factor, codec.latent_channels)
    parameters = sum(parameter.numel() for parameter in codec.vae.parameters())
    data = {
        "bench": "inspect",
        "codec": short_path(source),
        "fingerprint": codec.fingerprint,
        **provenance(codec.device),
        "parameters": parameters,
        "folder": short_path(str(folder)),
        "image_side": windows.x.shape[-1],
        "left_out": looked.left_out,
        **health.summary(),
        "curves": health.curves | {"klt_spectrum": latents.radial_spectrum(klt.encode(windows.x)),
                                   "image_spectrum": _image_spectrum(windows.x, codec.downsampling_factor)},
        "training": training_curves(Path(source)),
    }  # fmt: skip
    data["images"] = _image_rows(looked, windows)
    data["pictures"], data["viewer"] = _compared(windows, klt, data["images"], beside)
    if beside is not None:
        data["beside"] = {"codec": short_path(beside[0]), "fingerprint": beside[1].fingerprint}
    middle = data["viewer"][len(data["viewer"]) // 2]["image"]
    data["strips"] = _strips(codec, windows, health, middle)
    if windows.mean.shape[-2:] == (1, 1):
        data["space"] = _space(codec, windows, health, looked)
    return data


def total_passes(looked: OpenedImages, codec: LatentCodec) -> int:
    """For a progress bar of `inspect_codec`."""
    return passes(len(looked.x), codec.latent_channels)


def _image_spectrum(x: Tensor, f: int) -> list[tuple[float, float]] | None:
    return latents.radial_spectrum(F.avg_pool2d(x, f))


def _image_rows(looked: OpenedImages, windows: Windows) -> list[dict[str, Any]]:
    scores = decibels(windows.x, windows.y).tolist()
    return [{"file": name, "psnr_db": score} for name, score in zip(looked.names, scores, strict=True)]


def _compared(
    windows: Windows, klt: KLT, rows: Sequence[dict[str, Any]], beside: tuple[str, LatentCodec] | None
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Worst, median and best image: original, codec, another one, KLT, and JPEG of no more bits than 8-bit latents.

    Where no JPEG is so small, that of the lowest quality, whose label says that it is larger.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i]["psnr_db"])
    picked = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    pictures, samples = {}, []
    for word, i in picked.items():
        x = windows.x[i]
        linear = klt.decode(klt.encode(x[None]), (x.shape[-2], x.shape[-1]))[0]
        choices = [
            ("original", webp(x)),
            ("codec", webp(windows.y[i])),
            ("KLT, as many numbers", webp(linear)),
        ]
        if beside is not None:
            name = short_path(beside[0])
            taken = {label for label, _ in choices}  # as of a run's codec/, given from within its folder
            label = f"{name}, beside it" if name in taken else name
            choices.insert(2, (label, webp(reconstruct(beside[1], x[None])[0])))
        if len(x) in (1, 3) and x[0].numel() >= 64**2:
            most_bytes = windows.mean[i].numel()  # 8 bits each
            jpeg = image_codecs.code(x[None], "JPEG", most_bytes)
            larger = "" if jpeg.size <= most_bytes else f", {jpeg.size / most_bytes:.1f} x the latent"
            choices.append((f"JPEG, {jpeg.size / 1024:.1f} KiB{larger}", webp(jpeg.image[0])))
        for label, picture in choices:
            pictures[f"{i} {label}"] = picture
        samples.append(
            {
                "label": f"{word}: {rows[i]['psnr_db']:.1f} dB",
                "image": i,
                "choices": [{"label": label, "picture": f"{i} {label}"} for label, _ in choices],
            }
        )
    return pictures, samples


def _strips(codec: Inspectable, windows: Windows, health: Health, i: int) -> list[dict[str, Any]]:
    """Rows of small pictures of image `i`: its channels, principal colours, and decoded noisy latents."""
    z = windows.mean[i]
    height, width = windows.x.shape[-2:]
    rows: list[dict[str, Any]] = []
    if z.shape[-1] >= 4:
        channels = [(channel_picture(z[k]), f"channel {k}") for k in range(min(len(z), 64))]
        rows.append({"name": "channels", "pictures": [[webp(p), label] for p, label in channels]})
        shown = [(windows.x[i], "image"), (principal_colours(z), "its latent")]
        rows.append({"name": "colours", "pictures": [[webp(p), label] for p, label in shown[1:]]})
    scale = torch.tensor([channel["std"] for channel in health.channels])[:, None, None]
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(4)) * scale
    noisy = torch.stack([z + a * noise for a in STRIP_NOISES])
    decoded_rows = crop_middle(decoded(codec, noisy, (height, width)), STRIP)
    labels = [f"noise {a}" if a else "as it is" for a in STRIP_NOISES]
    rows.append(
        {
            "name": "noise",
            "pictures": [[webp(p), label] for p, label in zip(decoded_rows, labels, strict=True)],
        }
    )
    if z.shape[-1] >= 4:
        half = F.interpolate(z[None], scale_factor=0.5, mode="bilinear")
        f = codec.downsampling_factor
        small = decoded(codec, half, (half.shape[-2] * f, half.shape[-1] * f))[0]
        rows[-1]["pictures"].append([webp(crop_middle(small, STRIP)), "half-size latents"])
    return rows


def _space(codec: Inspectable, windows: Windows, health: Health, looked: OpenedImages) -> dict[str, Any]:
    """Of 1 x 1 latents: codes in a plane, the plane decoded, draws of N(0, I), traversals, an interpolation."""
    codes = windows.mean[:, :, 0, 0]
    c, side = codes.shape[1], min(windows.x.shape[-1], 64)
    size = (windows.x.shape[-2], windows.x.shape[-1])
    useful = sorted(range(c), key=lambda k: -(health.channels[k].get("drop_db") or 0))
    a, b = (useful + useful)[:2] if c > 1 else (0, 0)

    def draw(z: Tensor) -> Tensor:
        y = decoded(codec, z[:, :, None, None], size)
        return F.interpolate(y, size=(side, side), mode="area") if side < y.shape[-1] else y

    ticks = torch.linspace(-SPAN, SPAN, GRID)
    plane = codes.mean(0).repeat(GRID * GRID, 1)
    plane[:, b], plane[:, a] = ticks.flip(0).repeat_interleave(GRID), ticks.repeat(GRID)
    generator = torch.Generator().manual_seed(5)
    reach = torch.linspace(-SPAN, SPAN, 9)
    walks = []
    for k in useful[: min(c, 6)]:
        line = codes.mean(0).repeat(len(reach), 1)
        line[:, k] = reach
        walks.append([webp(tiles(draw(line), len(reach))), f"channel {k}, from -3 to 3"])
    share = torch.linspace(0, 1, 9)[:, None]
    between = [torch.lerp(codes[0], codes[j], share) for j in range(1, min(4, len(codes)))]
    labels = looked.labels or [0] * len(codes)
    return {
        "axes": [a, b],
        "points": [
            [x, y, k] for x, y, k in zip(codes[:, a].tolist(), codes[:, b].tolist(), labels, strict=True)
        ],
        "label_names": looked.label_names,
        "sheet": webp(tiles(_smaller(draw(plane), 28), GRID)),
        "draws": webp(tiles(draw(torch.randn(48, c, generator=generator)), 12)),
        "data": webp(tiles(F.interpolate(windows.x[:48], size=(side, side), mode="area"), 12)),
        "traversals": walks,
        "interpolations": [[webp(tiles(draw(line), 9)), "between two codes"] for line in between],
    }


def _smaller(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, size=(side, side), mode="area") if x.shape[-1] > side else x


def training_curves(source: Path) -> dict[str, Any] | None:
    """nll, KL, learning rate and PSNR by step, from the metrics.jsonl of the run; None where there is none.

    `source`: a run's folder, or one in it such as codec/; None for the name of a bundled codec or of one on the hub.
    Each curve has at most CURVE_POINTS points, each the median of its part of the run at the part's last step.
    """
    folder = source.parent if (source.parent / "metrics.jsonl").is_file() else source
    metrics = folder / "metrics.jsonl"
    # The name of a codec has no share in a run that the working folder happens to hold.
    if not source.exists() or not metrics.is_file():
        return None
    whole = [line for line in metrics.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
    lines = [json.loads(line) for line in whole]  # the last one may be half written
    curves: dict[str, list[list[float]]] = {}
    for key in ("total", "nll", "kl", "kl_weight", "lr", "psnr"):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        width = -(-len(points) // CURVE_POINTS) or 1
        parts = [points[start : start + width] for start in range(0, len(points), width)]
        if parts:
            curves[key] = [[part[-1][0], median(value for _, value in part)] for part in parts]
    settings = folder / "config.yaml"
    config = yaml.safe_load(settings.read_text("utf-8")) if settings.is_file() else {}
    return {
        "curves": curves,
        "kl_weight": config.get("loss", {}).get("kl_weight"),
        "run": short_path(str(folder)),
    }
