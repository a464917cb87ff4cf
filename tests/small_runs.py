"""Runs so small that a test can afford several: a codec of 45,000 parameters on crops of 32 pixels.

`train` is the project's own loop inside this process, watched: a test can spoil a batch, stop it or kill it.
"""

import json
import signal
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from latentcodec.training import loop
from latentcodec.training.config import Config
from latentcodec.training.data.config import DataConfig
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
            round_trip_weight=0.1,
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
    """A request to stop that no signal made, at a step of a trainer; None: never."""

    def __init__(self, trainer: Trainer | None = None, at: int | None = None) -> None:
        super().__init__()
        self.trainer, self.at = trainer, at

    @property
    def received(self) -> int:
        return 0 if self.at is None or self.trainer.state.step < self.at - 1 else signal.SIGTERM


class Killed(Exception):
    """Stands for a kill: nothing that would come after it is done."""


def train(trainer: Trainer, stop_at: int | None = None, kill_at: int | None = None, spoil=None) -> int | None:
    """The loop, whose exit code it returns; None where the training was killed.

    `stop_at`: the step at which it is asked to stop. `kill_at`: the step after whose line in metrics.jsonl it is
    left as it is. `spoil` is called with the trainer and each step's micro-batches.
    """
    step, log = trainer.train_step, trainer.journal.log

    def spoiled_step(micro_batches):
        if spoil is not None:
            spoil(trainer, micro_batches)
        return step(micro_batches)

    def log_and_die(number, *rest):
        log(number, *rest)
        if number == kill_at:
            raise Killed

    with patch.object(trainer, "train_step", spoiled_step), patch.object(trainer.journal, "log", log_and_die):
        try:
            return loop.train(trainer, Stop(trainer, stop_at))
        except Killed:
            return None


def bad_draws(*draws):
    """A `spoil` for `train`: a picture of these batches is not finite."""

    def spoil(trainer, micro_batches):
        if trainer.state.draw in draws:
            micro_batches[0]["pixels"][0] = torch.nan

    return spoil


def metrics(output: Path) -> list[dict]:
    """metrics.jsonl without the clocks, floats as hexadecimal: equal means bit-identical."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: _exact(value) for key, value in line.items() if not _is_clock(key)} for line in lines]


def state(trainer: Trainer) -> State:
    """A copy of everything that training moves, as flat tensors: what TrainState says that it is, without clocks."""
    flat = dict(_tensors("", trainer.state.state_dict()))
    clocks = {"numbers/seconds", "numbers/draw", "numbers/bad_steps"}
    clocks |= {key for key in flat if key.startswith("numbers/scaler") or "param_groups" in key}
    return {key: value.detach().clone() for key, value in flat.items() if key not in clocks}


def _tensors(name: str, value):
    """Leaves of nested dictionaries and lists, by path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _tensors(f"{name}/{key}".removeprefix("/"), inner)
    elif value is not None and not isinstance(value, str):
        yield name, torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float64)


def differing(one: State, other: State) -> list[str]:
    """The names of what is not equal to the bit, or is there only once."""
    both = one.keys() & other.keys()
    return sorted(
        (one.keys() ^ other.keys()) | {key for key in both if not torch.equal(one[key], other[key])}
    )


def recorded(config: Config) -> dict[str, torch.Tensor]:
    """What must be the same for any number of processes, of a run to its end: vectors by name, float64."""
    trainer = start(config)
    parameters, optimizer = trainer.gradients.parameters, trainer.state.optimizer
    record = {"begin": _flat(parameters)}
    step = optimizer.step

    def record_gradient_and_step() -> None:
        record[f"gradient {trainer.state.step}"] = _flat(p.grad for p in parameters)
        step()

    optimizer.step = record_gradient_and_step
    train(trainer)
    record |= {"end": _flat(parameters), "averages": _flat(trainer.state.ema.parameters())}
    record["discriminator"] = _flat(trainer.state.adversary.plain.parameters())
    statistics = trainer.exporter.latent_statistics()
    record["latents"] = torch.cat([statistics.mean, statistics.covariance.flatten()])
    return record


def _flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _is_clock(key: str) -> bool:
    return any(clock in key for clock in CLOCKS)


def _exact(value):
    return value.hex() if isinstance(value, float) else value
