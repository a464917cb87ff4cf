"""A codec inside a diffusers pipeline: picture in, noise, denoiser, picture out.

    python bench/pipeline.py --codec CODEC --out FOLDER [--images FOLDER]

The pipeline is diffusers' own StableDiffusionImg2ImgPipeline with a tiny untrained denoiser, so it shows plumbing
and not art: the codec's VAE is handed over as `vae=`, a little noise is added to the latents and the pipeline decodes
what the denoiser leaves of it. Without --images it works on drawn pictures. It writes the originals, the results and
pipeline.png (original, through the codec, through the pipeline), checks that the saved pipeline loads with diffusers
alone, and ends stdout with one line of JSON.

Shapes: C channels, H W pixels.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.extras import require
from latentcodec.machine import use_cores
from latentcodec.pixels import crop_middle, labelled_grid, save_image
from latentcodec.quality.metrics import psnr, reconstruct
from latentcodec.report.results import print_last_line
from latentcodec.sources.folders import FolderImages
from latentcodec.sources.synthetic import SyntheticSource
from latentcodec.vae.families import KL

RGBA = 4  # channels
PICTURES = 6
SIDE = 256  # pixels
SEED = 1  # of the drawn pictures: training draws those of seed 0
TEXT_WIDTH = 8  # of the embedding that stands for a prompt


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codec", required=True, help="folder, hub id, .safetensors file or bundled name")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pictures")
    parser.add_argument(
        "--images", help=f"folder of images, {SIDE} pixels a side or more; default: drawn pictures"
    )
    settings = parser.parse_args(arguments)
    require("bench", "transformers")  # without it diffusers has no pipelines
    use_cores()
    torch.manual_seed(0)
    logging.set_verbosity_error()  # that no text encoder is saved is no news here
    codec = LatentCodec.from_pretrained(settings.codec)
    require_fitting(codec, settings.codec)
    images = _images(settings.images, codec.image_channels)
    pipe = _pipeline(codec)
    rows: list[list[Tensor]] = [[], [], []]
    for index, x in enumerate(images):
        y, result = reconstruct(codec, x), _through(pipe, x)
        save_image(x, settings.out / "originals" / f"{index}.png")
        save_image(result, settings.out / "results" / f"{index}.png")
        for row, picture in zip(rows, (x, y, result), strict=True):
            row.append(picture[0])
    labelled = list(zip(("original", "codec", "through the pipeline"), rows, strict=True))
    save_image(labelled_grid(labelled), settings.out / "pipeline.png")
    pipe.save_pretrained(settings.out / "pipe")
    stock = AutoencoderKL.from_pretrained(settings.out / "pipe", subfolder="vae").eval()
    with torch.no_grad():
        difference = (stock(images[0]).sample - codec.vae(images[0]).sample).abs().max().item()
    decibel = torch.stack([psnr(x, y[None]) for x, y in zip(images, rows[1], strict=True)]).mean().item()
    print(f"{len(images)} pictures, as they were and as they come back: {settings.out / 'pipeline.png'}")
    print(
        f"diffusers alone, on the saved pipeline's VAE, differs by at most {difference:.1e} of a range of 2"
    )
    print_last_line({"images": len(images), "psnr": decibel, "largest_difference_to_diffusers": difference})


def require_fitting(codec: LatentCodec, source: str) -> None:
    """Raises ValueError for a codec that Stable Diffusion's pipeline cannot hold."""
    if codec.family is not KL:
        raise ValueError(
            f"--codec {source}: Stable Diffusion's pipeline, which this is, takes an AutoencoderKL, not an "
            f"{codec.family.name}"
        )
    if codec.image_channels == RGBA:
        raise ValueError(
            f"--codec {source}: diffusers takes pictures of 4 channels, such as RGBA, for latents"
        )


def _images(folder: str | None, channels: int) -> list[Tensor]:
    """Square centres [1, C, 256, 256] of the first images that are readable and large enough."""
    if folder is None:
        source = SyntheticSource(channels, seed=SEED)
        return [crop_middle(source.read(index), SIDE)[None] for index in range(PICTURES)]
    found = FolderImages(Path(folder).expanduser(), channels, SIDE)
    try:
        return [crop_middle(x, SIDE)[None] for _, x in islice(found, PICTURES)]
    finally:  # also where none can be used
        for item in found.left_out:
            print(f"left out: {item.reason}", file=sys.stderr)


def _pipeline(codec: LatentCodec) -> StableDiffusionImg2ImgPipeline:
    """Stable Diffusion's image-to-image pipeline around the codec, with a denoiser of a few thousand weights."""
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=codec.latent_channels,
        out_channels=codec.latent_channels,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )
    unet.conv_out.weight.data.zero_()  # an untrained denoiser that predicts no noise leaves the noise in
    pipe = StableDiffusionImg2ImgPipeline(
        vae=codec.vae,
        unet=unet,
        text_encoder=None,
        tokenizer=None,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _through(pipe: StableDiffusionImg2ImgPipeline, x: Tensor) -> Tensor:
    """[1, C, H, W] in [-1, 1] -> the same, after the last fiftieth of a diffusion."""
    text = torch.zeros(1, 1, TEXT_WIDTH)
    result = pipe(
        image=(x + 1) / 2,
        prompt_embeds=text,
        negative_prompt_embeds=text,
        strength=0.02,
        num_inference_steps=50,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    return result.images * 2 - 1


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
