"""Train a small denoiser on the latents of a store, and leave a diffusers pipeline that needs none of our code.

    latentcodec encode PHOTOS --codec photo-f8c16 --size 128 --mirrored --std --out latents
    accelerate launch examples/train_on_latents.py latents --out runs/denoiser --minutes 30

The denoiser is diffusers' own UNet2DConditionModel without a condition (its text is zeros), the loop is Accelerate's.
It leaves OUT/pipeline, a StableDiffusionPipeline with the codec of the store as its VAE, and OUT/samples.png: four
pictures drawn by that pipeline after it was saved and loaded by diffusers alone.

Shapes: B batch, c latent channels, h w latent cells.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from torch import Tensor
from torch.utils.data import DataLoader

from latentcodec import LatentStore, save_image
from latentcodec.extras import require
from latentcodec.pixels import image_grid

TEXT_WIDTH = 8  # of the zeros that stand for a prompt
SAMPLES = 4


def main(arguments: Sequence[str] | None = None) -> float:
    """Trains, saves and samples; returns the mean loss of the last tenth of the steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", help="a store of square latents of one size")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--max_steps", type=int, default=1_000_000)
    parser.add_argument("--batch_size", type=int, default=32, help="of one process")
    parser.add_argument("--width", type=int, default=64, help="channels of the denoiser's first level")
    parser.add_argument("--workers", type=int, default=1)
    settings = parser.parse_args(arguments)
    if settings.minutes <= 0 or settings.max_steps < 1:
        parser.error("--minutes must be above 0, and --max_steps at least 1")
    require("bench", "transformers")  # without it diffusers has no pipeline to save in the end

    accelerator = Accelerator()
    store = LatentStore(settings.store)
    denoiser = make_denoiser(store, settings.width)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=2e-4, weight_decay=0.01)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    average = EMAModel(denoiser.parameters(), decay=0.999, use_ema_warmup=True)  # where the denoiser is now
    noise_schedule = DDPMScheduler(prediction_type="v_prediction")  # 1000 steps, predicts velocity

    losses: list[float] = []
    end = time.monotonic() + 60 * settings.minutes
    for batch in epochs(store, settings.batch_size, settings.workers, accelerator):
        is_late = torch.tensor(time.monotonic() > end, device=accelerator.device)
        if (
            len(losses) == settings.max_steps or accelerator.gather(is_late).any()
        ):  # all processes end together
            break
        loss = step(model, noise_schedule, batch["latent"].float().to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(denoiser.parameters())
        losses.append(loss.item())
        if len(losses) % 100 == 0:
            accelerator.print(f"step {len(losses)}: loss {sum(losses[-100:]) / 100:.4f}")
    if accelerator.is_main_process:
        average.copy_to(denoiser.parameters())
        save_pipeline(store, denoiser.cpu(), settings.out / "pipeline")
        draw(settings.out)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def epochs(
    store: LatentStore, batch_size: int, workers: int, accelerator: Accelerator
) -> Iterator[dict[str, Any]]:
    """Batch after batch, for ever: each process its share, another order in each epoch."""
    batches = store.dataset(batch_size, rank=accelerator.process_index, world=accelerator.num_processes)
    if not len(batches):
        raise ValueError(f"{store.folder}: {len(store)} pictures fill no batch of {batches.global_batch}")
    for epoch in range(1_000_000_000):
        batches.set_epoch(epoch)
        yield from DataLoader(batches, batch_size=None, num_workers=workers)


def step(model: Any, schedule: DDPMScheduler, z: Tensor) -> Tensor:
    """Mean squared error of the velocity at a random time for each latent of [B, c, h, w]."""
    noise = torch.randn_like(z)
    times = torch.randint(schedule.config.num_train_timesteps, (len(z),), device=z.device)
    text = z.new_zeros(len(z), 1, TEXT_WIDTH)
    predicted = model(schedule.add_noise(z, noise, times), times, encoder_hidden_states=text).sample
    return F.mse_loss(predicted, schedule.get_velocity(z, noise, times))


def make_denoiser(store: LatentStore, width: int) -> UNet2DConditionModel:
    """A U-Net of three levels for the latents of the store. Raises ValueError for several sizes or oblong ones."""
    shapes = list(store.shapes)
    if len(shapes) != 1 or shapes[0][1] != shapes[0][2] or shapes[0][1] % 4:
        raise ValueError(
            f"{store.folder}: this example takes square latents of one size, not {shapes}; encode with --size"
        )
    c, side, _ = shapes[0]
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=c,
        out_channels=c,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def save_pipeline(store: LatentStore, denoiser: UNet2DConditionModel, folder: Path) -> None:
    """A StableDiffusionPipeline of diffusers' own parts: the store's codec is its VAE."""
    logging.set_verbosity_error()  # that there is no text encoder is no news here
    pipe = StableDiffusionPipeline(
        vae=store.codec().vae,
        unet=denoiser,
        scheduler=DDIMScheduler(
            prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
            timestep_spacing="trailing",
        ),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)


def draw(out: Path) -> None:
    """Loads the pipeline with diffusers alone and draws four pictures."""
    pipe = StableDiffusionPipeline.from_pretrained(out / "pipeline", text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    text = torch.zeros(SAMPLES, 1, TEXT_WIDTH)
    pictures = pipe(
        prompt_embeds=text,
        num_inference_steps=50,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    save_image(image_grid(list(pictures * 2 - 1), columns=SAMPLES), out / "samples.png")


if __name__ == "__main__":
    try:
        print(f"loss at the end: {main():.4f}")
    except (ValueError, OSError) as error:  # what the person who runs it can mend
        sys.exit(f"error: {error}")
