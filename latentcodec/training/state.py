"""Everything that a training step changes, in one place: what a checkpoint holds and a resume brings back.

There is no random state in it, since every draw is a function of (seed, position in the stream); see `randomness.py`.
Settings are not in it either: after a resume they are those of the configuration. How files are committed is in
`checkpoint.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from latentcodec.finite import require_finite
from latentcodec.training import checkpoint as checkpoints
from latentcodec.training.config import Config
from latentcodec.training.losses.adversary import Adversary
from latentcodec.training.losses.rate import RateControl
from latentcodec.training.optim.muon import Muon
from latentcodec.training.optim.schedule import (
    TrainConfig,
    ema_decay,
    learning_rate,
    load_optimizer,
    parameter_groups,
    update_ema,
)
from latentcodec.training.start.model import TrainedCodec

WEIGHTS = ("model", "ema", "discriminator")  # saved as safetensors
OPTIMIZERS = ("optimizer", "discriminator_optimizer")  # saved by torch


@dataclass
class TrainState:
    """Weights, averages, optimizers, rate control and counters of a run."""

    codec: TrainedCodec
    """The weights that the optimizer moves."""
    ema: AutoencoderKL
    """Their moving average: the weights that are validated and saved as codec/."""
    optimizer: torch.optim.Optimizer
    rate: RateControl
    """The weight of the KL divergence."""
    adversary: Adversary | None
    """The discriminator with its optimizer; None without one."""
    scaler: torch.amp.GradScaler | None
    """The scale of fp16 gradients; None in other precisions."""
    step: int = 0
    """Optimizer steps taken."""
    draw: int = 0
    """Global batches drawn from the stream, skipped ones too; counted in those of this start's size."""
    seconds: float = 0.0
    """Training time over all starts of the run."""
    bad_steps: int = 0
    """Steps in a row, up to now, in which a number was not finite."""
    rollbacks: int = 0
    """Returns to a checkpoint since the newest one was saved."""

    def move_weights(self, config: TrainConfig, progress: float) -> float:
        """One step of the optimizer and of the moving average; returns its learning rate at `progress` of the run."""
        progress = max(progress, 1 / config.max_steps)
        lr = learning_rate(config.lr, config.schedule, progress, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
        update_ema(self.ema, self.codec.vae, ema_decay(config.ema_decay, self.step))
        return lr

    def state_dict(self) -> dict[str, Any]:
        """Groups of tensors, states of optimizers, and under "numbers" what JSON can hold."""
        numbers: dict[str, Any] = {
            "step": self.step,
            "draw": self.draw,
            "seconds": self.seconds,
            "bad_steps": self.bad_steps,
            "rate": self.rate.state_dict(),
        }
        state = {
            "model": self.codec.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "numbers": numbers,
        }
        if self.adversary is not None:
            state["discriminator"] = self.adversary.plain.state_dict()
            state["discriminator_optimizer"] = self.adversary.optimizer.state_dict()
            numbers["adversary"] = self.adversary.numbers()
        if self.scaler is not None:
            numbers["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Rollbacks are counted from there, so they begin at 0."""
        numbers, model = saved["numbers"], dict(saved["model"])
        if not self.codec.log_scale.requires_grad:
            model["log_scale"] = self.codec.log_scale.detach()  # a setting then, as the weights of losses are
        self.codec.load_state_dict(model)
        self.ema.load_state_dict(saved["ema"])
        load_optimizer(self.optimizer, saved["optimizer"])
        self.rate.load_state_dict(numbers["rate"])
        if self.adversary is not None:
            self.adversary.plain.load_state_dict(saved["discriminator"])
            load_optimizer(self.adversary.optimizer, saved["discriminator_optimizer"])
            self.adversary.load_numbers(numbers["adversary"])
        # A run that changes to fp16 on its way has saved no scale yet and looks for it as a new one does.
        if self.scaler is not None and "scaler" in numbers:
            self.scaler.load_state_dict(numbers["scaler"])
        self.step, self.draw, self.seconds = numbers["step"], numbers["draw"], numbers["seconds"]
        self.bad_steps = numbers.get("bad_steps", 0)  # older checkpoints have none
        self.rollbacks = 0

    def roll_back(self, saved: Mapping[str, Any]) -> None:
        """Take earlier weights again, but go on in the stream, and count the time that was spent."""
        draw, seconds, rollbacks = self.draw, self.seconds, self.rollbacks
        self.load_state_dict(saved)
        self.draw, self.seconds, self.rollbacks, self.bad_steps = draw, seconds, rollbacks + 1, 0


def new_state(
    config: Config,
    vae: AutoencoderKL,
    rate: RateControl,
    adversary: Adversary | None,
    accelerator: Accelerator,
    layout: torch.memory_format,
) -> TrainState:
    """The state before the first step, of weights that `vae` starts from, in the memory format `layout`."""
    train, loss = config.train, config.loss
    codec = TrainedCodec(vae, loss.scale, loss.learn_scale)
    codec.to(accelerator.device)
    for parameter in codec.parameters():
        if parameter.ndim == 4:  # Qwen-Image's and Wan's convolutions in time have no such layout
            parameter.data = parameter.data.to(memory_format=layout)
    return TrainState(
        codec,
        ema=copy.deepcopy(vae).requires_grad_(False).eval(),
        optimizer=Muon(parameter_groups(codec, train.weight_decay), betas=train.betas, fused=True),
        rate=rate,
        adversary=adversary,
        scaler=accelerator.scaler,
    )


def save(state: TrainState, folder: Path, settings: Mapping[str, Any], keep_last: int) -> Path:
    """Commit a checkpoint of `state` and of the settings that it was made with; for the main process alone.

    Raises CheckpointError, and NotFinite for weights that hold NaN or infinite numbers: then nothing is saved.
    """
    parts = state.state_dict()
    for name in WEIGHTS:
        what = f"step {state.step} is not saved, and older checkpoints in {folder} are untouched (lower train.lr?)"
        require_finite(parts.get(name, {}), what)
    return checkpoints.save(
        folder,
        state.step,
        tensors={name: parts[name] for name in WEIGHTS if name in parts},
        objects={name: parts[name] for name in OPTIMIZERS if name in parts},
        state={**settings, **parts["numbers"]},
        keep_last=keep_last,
    )


def saved_state(checkpoint: checkpoints.Checkpoint) -> dict[str, Any]:
    """What `load_state_dict` takes, from a checkpoint; its tensors are on the CPU."""
    weights = {name: checkpoint.tensors(name) for name in WEIGHTS if checkpoint.has(name)}
    optimizers = {name: checkpoint.object(name) for name in OPTIMIZERS if checkpoint.has(name)}
    return {**weights, **optimizers, "numbers": checkpoint.state}
