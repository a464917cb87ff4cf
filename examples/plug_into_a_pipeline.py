"""Put a codec into a diffusers pipeline, run it, save it, and load it with diffusers alone.

    python examples/plug_into_a_pipeline.py --codec photo-f8c16 --out plugged [--photo photo.jpg]

The codec is a folder that training left, or a bundled name. The pipeline is diffusers' own image-to-image pipeline of
Stable Diffusion, put together from tiny random parts, so that nothing has to be fetched. Its denoiser predicts no
noise and only a little is added, so that what comes out shows what the VAE does: nothing of the photograph with the
random VAE that the pipeline was built with, the photograph with the codec.

It writes before.png, after.png and the pipeline as a plain diffusers folder, pipeline/.

Shapes: C channels, H W pixels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor

from latentcodec import LatentCodec, load_image, save_image
from latentcodec.extras import require
from latentcodec.quality.metrics import psnr
from latentcodec.sources.synthetic import SyntheticSource

SIDE = 512  # pixels of a photograph that go through, at most
TEXT_WIDTH = 8  # of the embedding that stands for a prompt
LEFT_OUT = dict.fromkeys(
    ("text_encoder", "tokenizer", "image_encoder", "feature_extractor", "safety_checker")
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codec", default="photo-f8c16", help="a folder, a hub id or a bundled name")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures and of the pipeline")
    parser.add_argument("--photo", help="what goes through the pipeline; default: a drawn picture")
    settings = parser.parse_args(arguments)
    require("bench", "transformers")  # without it diffusers has no pipelines
    torch.manual_seed(0)
    logging.set_verbosity_error()  # that no text encoder is saved is no news here

    codec = LatentCodec.from_pretrained(settings.codec)
    f, c = codec.downsampling_factor, codec.latent_channels
    x = (
        load_image(settings.photo) if settings.photo else SyntheticSource(3, seed=1).read(0)[None]
    )  # [1, 3, H, W]
    x = x[..., : min(x.shape[-2], SIDE) // f * f, : min(x.shape[-1], SIDE) // f * f]  # whole latent cells

    pipe = tiny_pipeline(c, f)
    save(run(pipe, x), x, settings.out / "before.png")

    codec.plug_into(pipe)  # the one line; it refuses a pipeline that was made for latents of another shape
    after = run(pipe, x)
    save(after, x, settings.out / "after.png")

    pipe.save_pretrained(settings.out / "pipeline")
    loaded = StableDiffusionImg2ImgPipeline.from_pretrained(settings.out / "pipeline", **LEFT_OUT)
    loaded.set_progress_bar_config(disable=True)
    same = (run(loaded, x) - after).abs().max().item()
    print(
        f"{settings.out / 'pipeline'}: by diffusers alone ({type(loaded.vae).__name__}) within {same:.0e} of it"
    )


def tiny_pipeline(c: int, f: int) -> StableDiffusionImg2ImgPipeline:
    """A stock pipeline of random parts, for latents of `c` channels and H/f x W/f cells."""
    stages = f.bit_length()  # f = 2^(stages - 1)
    vae = AutoencoderKL(
        latent_channels=c,
        block_out_channels=(8,) * stages,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        norm_num_groups=4,
    )
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=c,
        out_channels=c,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)  # it predicts no noise, and the little that is added stays
    torch.nn.init.zeros_(unet.conv_out.bias)
    pipe = StableDiffusionImg2ImgPipeline(
        vae=vae,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=1),
        requires_safety_checker=False,
        **LEFT_OUT,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: StableDiffusionImg2ImgPipeline, x: Tensor) -> Tensor:
    """[1, 3, H, W] in [-1, 1] -> the same, after the last fiftieth of a diffusion."""
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


def save(y: Tensor, x: Tensor, file: Path) -> None:
    save_image(y, file)
    print(f"{file}: {psnr(x, y).item():.1f} dB from what went in")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the person who runs it can mend
        sys.exit(f"error: {error}")
