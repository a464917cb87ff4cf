"""Runs so small that a test can afford several: a codec of 45,000 parameters on crops of 32 pixels.

`train` is the loop of train/train.py inside this process, so that a test can look into it, spoil a batch or stop it.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from latentcodec.training import survey
from latentcodec.training.config import Config
from latentcodec.training.data.stream import DataConfig
from latentcodec.training.export.codec_folder import FinishConfig
from latentcodec.training.losses.discriminator import DiscriminatorConfig
from latentcodec.training.losses.regularizers import RegularizerConfig
from latentcodec.training.losses.terms import LossConfig
from latentcodec.training.optim.schedule import TrainConfig
from latentcodec.training.signals import StopRequest
from latentcodec.training.start.model import ModelConfig
from latentcodec.training.trainer import Trainer

CLOCKS = ("second", "minute")  # parts of the keys of metrics.jsonl that tell the time

State = dict[str, torch.Tensor]


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


def small(output: Path, images: Path, workers: int = 0, **settings) -> Config:
    """The configuration of a small run; `settings` are fields of TrainConfig."""
    defaults = {"max_steps": 6, "batch_size": 2, "warmup": 0.3, "ema_decay": 0.9, "statistics_images": 8}
    defaults |= {"mixed_precision": "no", "threads": 1}  # the same on every machine
    every = {"validate_every": 4, "checkpoint_every": 2}
    return Config(
        output_dir=str(output),
        model=ModelConfig(
            latent_channels=4, block_out_channels=[8, 8, 16], norm_num_groups=2, init="default"
        ),
        data=DataConfig(path=str(images), resolution=32, val_images=2, val_resolution=32, workers=workers),
        finish=FinishConfig(certificate_images=0),
        train=TrainConfig(**{**defaults, **every, **settings}),
    )


def write_config(config: Config, path: Path) -> Path:
    """The configuration as a file for `--config`."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    return path


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


def reset() -> None:
    """Make Accelerate's state anew, which a process otherwise has once."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def new_trainer(config: Config) -> Trainer:
    """A Trainer as in a process of its own."""
    reset()
    return Trainer(config)


def start(config: Config) -> Trainer:
    """A Trainer that has begun or resumed its run."""
    trainer = new_trainer(config)
    trainer.resume()
    return trainer


class Stop(StopRequest):
    """A request to stop that no signal made."""

    number = 0

    @property
    def received(self) -> int:
        return self.number


def train(trainer: Trainer, stop_at: int | None = None, kill_at: int | None = None, spoil=None) -> None:
    """The loop of train/train.py.

    `stop_at`: the step at which it is asked to stop. `kill_at`: the step after whose line in metrics.jsonl it is
    left as it is. `spoil` is called with the trainer and each step's micro-batches.
    """
    stop, every = Stop(), trainer.config.train
    for micro_batches in trainer.steps(stop):
        if stop_at is not None and trainer.step >= stop_at - 1:
            stop.number = 15
        if spoil is not None:
            spoil(trainer, micro_batches)
        report = trainer.train_step(micro_batches)
        if report is None:
            continue
        trainer.journal.log(trainer.step, trainer.progress, report)
        if trainer.step == kill_at:
            return
        if trainer.due(every.validate_every):
            trainer.validate()
        if trainer.due(every.checkpoint_every):
            trainer.save_codec()
            trainer.checkpoint()
    trainer.checkpoint()
    if not trainer.stopped_by:
        trainer.finish()


def metrics(output: Path) -> list[dict]:
    """metrics.jsonl without the clocks, floats as hexadecimal: equal means bit-identical."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: _exact(value) for key, value in line.items() if not _is_clock(key)} for line in lines]


def state(trainer: Trainer) -> State:
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


def differing(one: State, other: State) -> list[str]:
    """The names of what is not equal to the bit, or is there only once."""
    both = one.keys() & other.keys()
    return sorted(
        (one.keys() ^ other.keys()) | {key for key in both if not torch.equal(one[key], other[key])}
    )


def recorded(config: Config) -> dict[str, torch.Tensor]:
    """What must be the same for any number of processes, of a run to its end: vectors by name, float64."""
    trainer = start(config)
    record = {"begin": _flat(trainer.parameters)}
    step = trainer.optimizer.step

    def record_gradient_and_step() -> None:
        record[f"gradient {trainer.step}"] = _flat(p.grad for p in trainer.parameters)
        step()

    trainer.optimizer.step = record_gradient_and_step
    train(trainer)
    record |= {"end": _flat(trainer.parameters), "averages": _flat(trainer.ema.parameters())}
    record["discriminator"] = _flat(trainer.adversary.plain.parameters())
    moments = survey.moments(trainer)
    record["latents"] = torch.cat([moments.mean, moments.covariance.flatten()])
    return record


def _flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _averages(name: str, optimizer: torch.optim.Optimizer) -> State:
    entries = optimizer.state_dict()["state"].items()
    return {
        f"{name}/{index}/{key}": torch.as_tensor(value)
        for index, entry in entries
        for key, value in entry.items()
    }


def _is_clock(key: str) -> bool:
    return any(clock in key for clock in CLOCKS)


def _exact(value):
    return value.hex() if isinstance(value, float) else value
