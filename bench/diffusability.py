"""How well a small denoiser of fixed size and compute learns each codec's latents.

    python bench/diffusability.py --codec CODEC [CODEC ...] --images FOLDER --out FOLDER [--small]

The same denoiser, steps, batches and seeds for every codec: a rectified flow on the latents of square crops. Samples
are decoded and compared with held-out crops in pixel space, by a Frechet distance in features that are named (no FID,
which needs Inception). Four numbers stand beside each other: the reconstruction of the crops that the model learnt from
(the floor: what a perfect model draws), the model, a Gaussian with the latents' own mean and covariance, and decoded
noise (the ceiling). A model that does not beat the Gaussian has learnt nothing that a covariance does not know, and its
number means nothing: the page says so.

The default takes about a GPU hour for a codec. --small is for CPUs, some ten minutes a seed: crops of 32 pixels, and
features of a network (--lpips_net), since those of pixels hardly tell a model from the Gaussian. --smoke only shows
that everything runs.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from latentcodec.codec import LatentCodec
from latentcodec.machine import use_cores
from latentcodec.quality.features import (
    Features,
    features_of_all,
    frechet_distance,
    gaussian_like,
    network_features,
    pixel_statistics,
)
from latentcodec.quality.perceptual import SMALLEST_SIDE, load_lpips
from latentcodec.report import results as report
from latentcodec.report.build import write_result
from latentcodec.report.pages.diffusability import table
from latentcodec.report.pictures import tiles, webp
from latentcodec.sources.folders import FolderImages

SAMPLER_STEPS = 40  # of Euler's method
BATCH = 64  # crops that are encoded, decoded or drawn in one call
AVERAGING = 0.999  # of the denoiser's weights over the steps
SHOWN = 16  # samples on the page


@dataclass(frozen=True)
class Budget:
    """What every codec gets alike."""

    side: int
    """Pixels of the square crops."""
    crops: int
    """For training; a quarter as many are held out."""
    steps: int
    batch: int
    widths: tuple[int, ...]
    """Of the denoiser's stages."""
    lr: float
    samples: int


BUDGETS = {
    "smoke": Budget(side=64, crops=64, steps=20, batch=8, widths=(32, 64), lr=3e-4, samples=32),
    "small": Budget(side=32, crops=24_000, steps=1_500, batch=128, widths=(64, 128), lr=1e-3, samples=2_000),
    "real": Budget(
        side=256, crops=20_000, steps=30_000, batch=64, widths=(128, 256, 512), lr=3e-4, samples=2_000
    ),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--codec", nargs="+", required=True, help="folder, hub id or bundled name; several are compared")
    add("--images", type=Path, required=True, help="folder of images, at least as large as a crop")
    add("--out", type=Path, required=True, help="folder for the JSON and the HTML file")
    sizes = parser.add_mutually_exclusive_group()
    for name, what in (("smoke", "a trial that proves nothing of a codec"), ("small", "for CPUs")):
        sizes.add_argument(f"--{name}", dest="setting", action="store_const", const=name, help=what)
    parser.set_defaults(setting="real")
    add("--steps", type=int, help="of the denoiser's training; default: those of the setting")
    add("--seeds", type=int, default=2, help="trainings of each codec, for the spread (%(default)s)")
    nets = ("none", *SMALLEST_SIDE)
    add(
        "--lpips_net", choices=nets, default="none", help="features; none: statistics of pixels (%(default)s)"
    )
    add("--lpips_weights", type=Path, help="its weights as safetensors; default: torchvision's own")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    report.print_threads(use_cores())
    try:
        run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"diffusability.py: {error}") from error


def run(options: argparse.Namespace) -> None:
    for option in ("seeds", "steps"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} {value}: at least 1")
    budget = BUDGETS[options.setting]
    steps = options.steps or budget.steps
    report.require_folder(options.out)
    named, features = open_features(options)
    names = report.short_names(options.codec)
    codecs = {
        name: LatentCodec.from_pretrained(source, device=options.device)
        for name, source in zip(names, options.codec, strict=True)
    }
    channels = {codec.image_channels for codec in codecs.values()}
    if len(channels) > 1:
        raise ValueError(f"--codec: on one page all take the same image channels, not {sorted(channels)}")
    train, held_out = open_crops(options.images, budget, channels.pop())
    reference = features_of_all(features, held_out)
    entries, pictures = [], []
    for name, codec in codecs.items():
        entry, samples = measure(name, codec, train, held_out, reference, features, budget, steps, options)
        entries.append(entry)
        pictures.append([webp(tiles(samples, 8)), f"{name}, seed 0"])
    data: dict[str, Any] = {
        "bench": "diffusability",
        **report.provenance(torch.device(options.device)),
        "setting": options.setting,
        "budget": {**vars(budget), "steps": steps, "seeds": options.seeds, "sampler_steps": SAMPLER_STEPS},
        "features": named,
        "folder": report.short_path(str(options.images)),
        "train": len(train),
        "held_out": len(held_out),
        "codecs": entries,
    }
    report.print_table(*table(data))
    files = write_result(
        data | {"samples": pictures},
        options.out,
        report.stem(options.codec, data["hardware"], "diffusability"),
    )
    print("\n".join(["", *files.values()]))
    report.print_last_line(data | {"files": files})


def open_features(options: argparse.Namespace) -> tuple[str, Features]:
    """What the distance is measured in, by name. Raises ValueError where the weights are not to be had."""
    if options.lpips_net == "none":
        return "statistics of pixels at four scales", pixel_statistics
    network = load_lpips(options.lpips_net, options.lpips_weights)
    return f"channel means of the {options.lpips_net} network of LPIPS", network_features(network)


def open_crops(folder: Path, budget: Budget, channels: int) -> tuple[Tensor, Tensor]:
    """[N, C, S, S] to train on, and others held out: the same crops for every codec, of different images."""
    generator = torch.Generator().manual_seed(0)
    images = FolderImages(folder, channels, budget.side)
    each = -(-(budget.crops + budget.crops // 4) // len(images.paths))
    crops = [[_crop(x, budget.side, generator) for _ in range(each)] for _, x in images]
    report.print_left_out(images.left_out)
    if len(crops) < 5:
        raise ValueError(
            f"{folder}: {len(crops)} images of {budget.side} pixels a side; at least 5 are needed"
        )
    held_out = crops[::5]  # from all over the folder
    others = [image for number, image in enumerate(crops) if number % 5]
    # a crop of each image, then another of each, so that the first ones are of all images
    train, reference = ([image[k] for k in range(each) for image in part] for part in (others, held_out))
    return torch.stack(train[: budget.crops]), torch.stack(reference[: budget.crops // 4])


def _crop(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in x.shape[-2:])
    return x[:, top : top + side, left : left + side].clone()  # so that the image itself can go


def measure(
    name: str,
    codec: LatentCodec,
    train: Tensor,
    held_out: Tensor,
    reference: Tensor,
    features: Features,
    budget: Budget,
    steps: int,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], Tensor]:
    """The four distances of one codec, and samples [N, C, S, S] of its first seed."""
    z = torch.cat([codec.encode(part) for part in train.split(BATCH)])
    count, size = budget.samples, budget.side

    def distance(latents: Tensor) -> tuple[float, Tensor]:
        y = torch.cat(
            [codec.decode(part, size=(size, size)).clamp(-1, 1).cpu() for part in latents.split(BATCH)]
        )
        return frechet_distance(features_of_all(features, y), reference), y

    floor, _ = distance(z[:count])
    gaussian, _ = distance(gaussian_like(z.cpu(), count, seed=0))
    noise, _ = distance(torch.randn(count, *z.shape[1:], generator=torch.Generator().manual_seed(1)))
    found, shown = [], torch.empty(0)
    for seed in range(options.seeds):
        denoiser = train_denoiser(z, budget, steps, seed, f"{name}, seed {seed}")
        value, y = distance(sample(denoiser, (count, *z.shape[1:]), z.device, seed))
        found.append(value)
        shown = y[:SHOWN] if seed == 0 else shown
    mean = fmean(found)
    return {
        "codec": name,
        "fingerprint": codec.fingerprint,
        "latent": f"f{codec.downsampling_factor}c{codec.latent_channels}",
        "floor": floor,
        "distance": mean,
        "seeds": found,
        "spread": stdev(found) if len(found) > 1 else None,
        "gaussian": gaussian,
        "noise": noise,
        "skill": (gaussian - mean) / (gaussian - floor) if gaussian > floor else None,
        "parameters": sum(p.numel() for p in denoiser.parameters()),
    }, shown


def train_denoiser(z: Tensor, budget: Budget, steps: int, seed: int, what: str) -> UNet2DModel:
    """A rectified flow on latents z [N, c, h, w] (Liu et al. 2023): v = noise - z, times logit-normal (Esser 2024)."""
    torch.manual_seed(seed)
    deep = max(1, min(len(budget.widths), z.shape[-1].bit_length() - 1))
    widths = budget.widths[:deep]
    denoiser = UNet2DModel(
        sample_size=z.shape[-1],
        in_channels=z.shape[1],
        out_channels=z.shape[1],
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * deep,
        up_block_types=("UpBlock2D",) * deep,
        norm_num_groups=16,
    ).to(z.device)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=budget.lr, weight_decay=0.01)
    average = EMAModel(denoiser.parameters(), decay=AVERAGING, use_ema_warmup=True)
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(steps), desc=what, unit="step"):
        optimizer.param_groups[0]["lr"] = budget.lr * min(
            1.0, (step + 1) / 100, (steps - step) / (0.3 * steps)
        )
        picked = torch.randint(len(z), (budget.batch,), generator=generator)
        clean = z[picked.to(z.device)]
        noise = torch.randn(clean.shape, generator=generator).to(z)
        t = torch.randn(budget.batch, generator=generator).sigmoid().to(z)
        mixed = torch.lerp(clean, noise, t[:, None, None, None])
        loss = (denoiser(mixed, 1000 * t).sample - (noise - clean)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(denoiser.parameters())
    average.copy_to(denoiser.parameters())
    return denoiser.eval()


@torch.inference_mode()
def sample(denoiser: UNet2DModel, shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    """Euler's method from noise to latents [N, c, h, w], in equal steps of t."""
    generator = torch.Generator().manual_seed(1000 + seed)
    parts = []
    for part in torch.randn(shape, generator=generator).split(BATCH):
        x = part.to(device)
        for k in range(SAMPLER_STEPS):
            t = torch.full((len(x),), 1 - k / SAMPLER_STEPS, device=device)
            x = x - denoiser(x, 1000 * t).sample / SAMPLER_STEPS
        parts.append(x)
    return torch.cat(parts)


if __name__ == "__main__":
    main()
