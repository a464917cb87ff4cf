"""Runs so small that a test can afford several: a 6,000-parameter codec on crops of 32 pixels, with everything on."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from latentcodec.training.config import Config
from latentcodec.training.data import DataConfig
from latentcodec.training.discriminator import DiscriminatorConfig
from latentcodec.training.finish import FinishConfig
from latentcodec.training.losses import LossConfig
from latentcodec.training.model import ModelConfig
from latentcodec.training.optimization import TrainConfig
from latentcodec.training.regularizers import RegularizerConfig
from latentcodec.training.signals import StopRequest
from latentcodec.training.trainer import Trainer

CLOCKS = ("second", "minute")  # parts of the keys of metrics.jsonl that tell the time


def write_images(folder: Path, count: int = 12, side: int = 48) -> Path:
    """Coloured noise, smoothed: pictures that a codec can learn something of."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        noise = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(
            folder / f"{number:02}.png"
        )
    return folder


def small(output: Path, images: Path, **settings) -> Config:
    """The configuration of a small run; `settings` are fields of TrainConfig."""
    train = {
        "max_steps": 6,
        "batch_size": 2,
        "lr": 1e-3,
        "warmup": 0.3,
        "ema_decay": 0.9,
        "validate_every": 4,
        "checkpoint_every": 2,
        "statistics_images": 8,
        **settings,
    }
    return Config(
        output_dir=str(output),
        model=ModelConfig(
            latent_channels=4, block_out_channels=[8, 8, 16], norm_num_groups=2, init="default"
        ),
        data=DataConfig(path=str(images), resolution=32, val_images=2, val_resolution=32, workers=0),
        finish=FinishConfig(certificate_images=0),
        train=TrainConfig(**train),
    )


def everything(config: Config) -> Config:
    """The same run with every part of the objective that has a state, a random draw or a statistic of the step."""
    return replace(
        config,
        loss=LossConfig(
            kl_weight=1e-3, kl_warmup_steps=3, learn_scale=True, scale=0.3, free_bits=0.05, target_bits=2.0
        ),
        regularizer=RegularizerConfig(
            equivariance_probability=0.5,
            low_resolution_probability=0.25,
            latent_noise_share=0.5,
            interpolative_noise=0.5,
            additive_noise=0.5,
            scale_equivariance_weight=0.1,
        ),
        discriminator=DiscriminatorConfig(weight=0.5, start_step=1, channels=8, layers=1, lr=1e-3),
    )


def start(config: Config) -> Trainer:
    """A Trainer as in a process of its own: Accelerate's state, which a process has once, is made anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    trainer = Trainer(config)
    trainer.resume()
    return trainer


class Stop(StopRequest):
    """A request to stop that no signal made."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    @property
    def received(self) -> int:
        return self.number


def train(trainer: Trainer, until: int | None = None, before=nullcontext) -> list[dict]:
    """The loop of train/train.py; `until` asks it to stop there. Returns what the journal was told."""
    stop, every, reports = Stop(), trainer.config.train, []
    for micro_batches in trainer.steps(stop):
        if until is not None and trainer.step >= until - 1:
            stop.number = 15
        report = trainer.train_step(micro_batches)
        if report is None:
            continue
        reports.append(report)
        trainer.journal.log(trainer.step, trainer.progress, report)
        if trainer.due(every.validate_every):
            trainer.validate()
        if trainer.due(every.checkpoint_every):
            trainer.save_codec()
            trainer.checkpoint()
    trainer.checkpoint()
    return reports


def timeless(record: dict) -> dict:
    """A record of metrics.jsonl without the clocks, floats as hexadecimal: equal means bit-identical."""
    kept = {key: value for key, value in record.items() if not any(clock in key for clock in CLOCKS)}
    return {key: value.hex() if isinstance(value, float) else value for key, value in kept.items()}


def metrics(output: Path) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of everything that training moves: weights, averages, both optimizers, the rate control, the step."""
    tensors = {f"model/{key}": value for key, value in trainer.codec.state_dict().items()}
    tensors |= {f"ema/{key}": value for key, value in trainer.ema.state_dict().items()}
    tensors |= _averages("optimizer", trainer.optimizer)
    rate, adversary = trainer.objective.rate, trainer.adversary
    tensors |= {"rate": torch.tensor(rate.weight, dtype=torch.float64), "reference": rate.reference}
    tensors["step"] = torch.tensor(trainer.step)
    if adversary is not None:
        tensors |= {f"discriminator/{key}": value for key, value in adversary.state_dict().items()}
        tensors |= _averages("discriminator_optimizer", adversary.optimizer)
        numbers = [adversary.adaptive, *vars(adversary.health).values()]
        tensors["adversary"] = torch.tensor(numbers, dtype=torch.float64)
    return {key: value.detach().clone() for key, value in tensors.items()}


def _averages(name: str, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    entries = optimizer.state_dict()["state"].items()
    return {
        f"{name}/{index}/{key}": torch.as_tensor(v) for index, entry in entries for key, v in entry.items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names of what differs, in a bit or in being there."""
    return sorted(
        {*one} ^ {*other}
        | {key for key in one.keys() & other.keys() if not torch.equal(one[key], other[key])}
    )
