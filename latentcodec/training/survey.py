"""What is looked at over the training crops outside the steps: a first look for the start, the latents for codec/.

All processes measure together what one would measure alone. What the numbers mean is in `latents.py` and `teacher.py`.

Shapes: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from latentcodec.latents import LatentStatistics, latent_statistics
from latentcodec.training.data.stream import TrainingImages, training_batches
from latentcodec.training.progress import counted

if TYPE_CHECKING:
    from latentcodec.training.losses.teacher import Drift
    from latentcodec.training.trainer import Trainer

START_CROPS = 64  # for the linear start: more change its PSNR by less than 0.1 dB
START_PARTS = 8  # in which they are read


def start_crops(images: TrainingImages) -> list[Tensor]:
    """The first crops [C, H, W] of the stream, the same in every process."""
    size = START_CROPS // START_PARTS
    parts = training_batches(
        images, size, accumulation=START_PARTS, steps=1
    )  # one step, so crops of one shape
    return [
        crop
        for part in counted(parts, "reading the first crops", START_PARTS, "part")
        for crop in part["pixels"]
    ]


def moments(trainer: Trainer) -> LatentStatistics | None:
    """Of the averaged weights' latents; None where another codec's normalisation holds."""
    if trainer.config.model.keeps_latents:
        return None
    with trainer.accelerator.autocast():
        return latent_statistics(trainer.ema, _crops(trainer), _total(trainer))


def drift(trainer: Trainer) -> Drift | None:
    """Of the averaged weights' latents from the teacher's; None without a teacher."""
    if trainer.teacher is None:
        return None
    return trainer.teacher.drift(trainer.ema, _crops(trainer), _total(trainer))


def _crops(trainer: Trainer) -> Iterator[Tensor]:
    """[B, C, H, W]: this process's share of the `train.statistics_images` crops."""
    train, accelerator = trainer.config.train, trainer.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    steps = -(-train.statistics_images // (train.batch_size * world))
    batches = training_batches(trainer.images, train.batch_size, steps=steps, rank=rank, world_size=world)
    for batch in counted(batches, "measuring the latents", steps, "batch"):
        yield batch["pixels"].to(accelerator.device, memory_format=trainer.layout)


def _total(trainer: Trainer) -> partial[Tensor]:
    """What adds sums up over the processes."""
    return partial(trainer.accelerator.reduce, reduction="sum")
