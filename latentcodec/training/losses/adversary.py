"""The discriminator's part of a training step: its optimizer, its step, and the weight of the generator's loss.

The losses themselves are in `discriminator.py`. Before `start_step` nothing here is called.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentcodec.training.losses.discriminator import (
    DiscriminatorConfig,
    DiscriminatorHealth,
    PatchGAN,
    adaptive_weight,
    collapse_alarm,
    discriminator_losses,
    generator_loss,
)


class Adversary:
    """A PatchGAN and its AdamW, trained beside the codec."""

    def __init__(
        self, config: DiscriminatorConfig, image_channels: int, smallest_crop: int, accelerator: Accelerator
    ) -> None:
        """Raises ValueError where the smallest crop (pixels a side) is too small for it."""
        self.config, self.accelerator = config, accelerator
        self.plain = PatchGAN(image_channels, config.channels, config.layers).to(accelerator.device)
        if smallest_crop < self.plain.smallest_side:
            raise ValueError(
                f"discriminator.layers {config.layers} needs images of {self.plain.smallest_side} pixels a side, and "
                f"training shows it some of {smallest_crop}; lower it, or raise data.resolution"
            )
        self.optimizer = torch.optim.AdamW(
            self.plain.parameters(), lr=config.lr, betas=(0.5, 0.9), fused=True
        )
        self.model = accelerator.prepare(self.plain)
        self.health = DiscriminatorHealth()
        # The weight follows from the gradients of the whole step before, so that N processes equal one.
        self.adaptive = 1.0
        self._gradients: list[Tensor] = []

    @classmethod
    def of(
        cls, config: DiscriminatorConfig, image_channels: int, smallest_crop: int, accelerator: Accelerator
    ) -> Adversary | None:
        """None where the adversarial loss is off."""
        return cls(config, image_channels, smallest_crop, accelerator) if config.weight else None

    def active(self, step: int) -> bool:
        """Whether it takes part in this optimizer step."""
        return step >= self.config.start_step

    def generator(self, y: Tensor) -> Tensor:
        """Scalar: the generator's loss, through the frozen discriminator."""
        with self.accelerator.autocast():
            return generator_loss(self.plain, y).mean()

    def weight(
        self, reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, accumulation: int
    ) -> float:
        """The factor of the generator's loss in this step; adds up the gradients that give the next step's."""
        if not self.config.adaptive:
            return self.config.weight
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()  # else fp16 would lose small gradients
        pair = [
            torch.autograd.grad(loss * scale, last_layer, retain_graph=True)[0] / (scale * accumulation)
            for loss in (reconstruction, adversarial)
        ]
        noted = self._gradients or [torch.zeros_like(last_layer)] * 2
        self._gradients = [old + new for old, new in zip(noted, pair, strict=True)]
        return self.config.weight * self.adaptive

    def backward(self, x: Tensor, y: Tensor, accumulation: int, last: bool) -> dict[str, Tensor]:
        """The discriminator's own loss on one micro-batch, and its backward; means, without gradient."""
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            losses = {k: v.mean() for k, v in discriminator_losses(self.model, x, y).items()}
            self.accelerator.backward(losses["d_loss"] / accumulation)
        return {name: value.detach() for name, value in losses.items()}

    def gradient_norm(self) -> Tensor:
        """Scalar: the norm of the discriminator's gradient."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.plain.parameters() if p.grad is not None])

    def step(self, report: dict[str, float]) -> dict[str, float]:
        """Move the discriminator's weights, compute the next adaptive weight, and warn where training it has failed.

        `report` has the step's means over all processes; returns what to add to it.
        """
        changes = {
            "adversarial_weight": self.config.weight * (self.adaptive if self.config.adaptive else 1.0)
        }
        self.optimizer.step()
        if self._gradients:
            reconstruction, adversarial = self.accelerator.reduce(self._gradients, reduction="mean")
            if adversarial.isfinite().all():  # in fp16 it may overflow alone; then the last weight stays
                self.adaptive = adaptive_weight([reconstruction], [adversarial]).item()
        self.health = self.health.updated(
            report["d_accuracy"], report["d_logit_real"], report["d_logit_fake"]
        )
        alarm = collapse_alarm(self.config, self.health)
        if alarm and self.health.steps % self.config.alarm_after_steps == 0:
            warnings.warn(alarm, stacklevel=2)
        return changes

    def drop_gradients(self) -> None:
        """Forget the gradients of a step, taken or skipped."""
        self.optimizer.zero_grad(set_to_none=True)
        self._gradients = []

    def numbers(self) -> dict[str, Any]:
        """What a step changes beside the weights and the optimizer, as JSON has it."""
        return {"adaptive": self.adaptive, "health": asdict(self.health)}

    def load_numbers(self, saved: dict[str, Any]) -> None:
        """Go on from what `numbers` gave."""
        self.adaptive, self.health = saved["adaptive"], DiscriminatorHealth(**saved["health"])
