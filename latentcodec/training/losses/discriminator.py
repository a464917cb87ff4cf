"""The adversarial loss: a PatchGAN, its hinge losses, the balance with the reconstruction and an alarm.

Nothing here takes a step. The order in the training step, which keeps both gradients apart: the codec's loss
with `generator_loss` (the discriminator frozen), the codec's step, then `discriminator_losses` (the images
detached) and the discriminator's step. Before `start_step` neither is called.

Shapes: B batch, C image channels, H W pixels, P patches of an image. Pixels are in [-1, 1].
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST_ADAPTIVE_WEIGHT = 1e4  # as in VQGAN
SMALLEST_GRADIENT = 1e-4  # as in VQGAN: keeps the ratio finite


@dataclass
class DiscriminatorConfig:
    """The adversarial loss; off with a weight of 0, and then no discriminator exists."""

    weight: NonNegativeFloat = 0.0
    """Factor of the generator's loss, which is a mean logit; times the adaptive weight where that is on.
    Usual: 0.5 with it, 0.1 without."""
    start_step: NonNegativeInt = 50000
    """Optimizer step of its first use; until then it takes no computation. It starts untrained: the first
    steps teach it while its weight already counts."""
    adaptive: bool = True
    """Scale the weight by the ratio of the gradient norms of reconstruction and adversarial loss at the
    decoder's last layer (VQGAN). Costs two more backward passes to that layer."""
    channels: PositiveInt = 64
    """Channels of its first layer; doubled by every layer up to eightfold."""
    layers: PositiveInt = 3
    """Its stride-2 layers: 3 look at patches of 70 x 70 pixels, 2 at 34 x 34, 4 at 142 x 142."""
    lr: PositiveFloat = 1e-4
    """Learning rate of its AdamW."""
    alarm_accuracy: ClosedUnitInterval = 0.98
    """Running accuracy at which the discriminator has won and teaches nothing any more."""
    alarm_chance: ClosedUnitInterval = 0.52
    """Running accuracy below which it has learned nothing, as a coin has 0.5."""
    alarm_logit: PositiveFloat = 30.0
    """Running mean magnitude of a logit at which it diverges; the hinge is content with 1."""
    alarm_after_steps: PositiveInt = 1000
    """Optimizer steps after start_step before the alarm may sound."""


class PatchGAN(nn.Module):
    """A logit for every overlapping patch of an image: real where it is positive.

    Isola et al., "Image-to-image translation with conditional adversarial networks", 2017, with group norm in
    place of batch norm: the logits of an image do not depend on the rest of the batch, so N processes equal
    one, and real and fake images can share a forward pass.
    """

    def __init__(self, image_channels: int, channels: int, layers: int) -> None:
        """channels: of the first layer, doubled by each up to eightfold. layers: those of stride 2."""
        super().__init__()
        self.smallest_side = 3 * 2**layers  # the last two layers take one pixel off each
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (before, width) in enumerate(pairwise(widths)):
            stride = 2 if i < layers - 1 else 1
            blocks += [nn.Conv2d(before, width, 4, stride, 1, bias=False), _norm(width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P] logits. Raises `ValueError` for images too small to have one."""
        if min(x.shape[-2:]) < self.smallest_side:
            raise ValueError(
                f"the discriminator needs images of at least {self.smallest_side} pixels a side, not "
                f"{x.shape[-2]} x {x.shape[-1]}; lower discriminator.layers or raise data.resolution"
            )
        return self.layers(x).flatten(1)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, width // 16), width)


def generator_loss(discriminator: nn.Module, y: Tensor) -> Tensor:
    """[B], mean over an image's patches: -D(y), the hinge loss of the generator (Lim and Ye 2017).

    The discriminator is frozen for the forward pass, so the backward pass reaches y and leaves it no
    gradient. Give the plain module, not one wrapped for data parallel training, which waits for gradients.
    """
    with frozen(discriminator):
        return -discriminator(y).mean(1)


def discriminator_losses(discriminator: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The discriminator's loss on real images x and reconstructions y, and how well it does; all [B].

    "d_loss": (relu(1 - D(x)) + relu(1 + D(y))) / 2, a mean over patches. "d_accuracy": the share of the
    patches on the right side of 0. "d_logit_real" and "d_logit_fake": mean logits. Both images are
    detached: the codec gets no gradient from here.
    """
    logits = discriminator(torch.cat([x.detach(), y.detach()]))
    real, fake = logits.chunk(2)
    return {
        "d_loss": hinge_loss(real, fake).mean(1),
        "d_accuracy": ((real > 0).float() + (fake < 0).float()).detach().mean(1) / 2,
        "d_logit_real": real.detach().mean(1),
        "d_logit_fake": fake.detach().mean(1),
    }


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge, same shape as the logits: (relu(1 - real) + relu(1 + fake)) / 2."""
    return (F.relu(1 - real) + F.relu(1 + fake)) / 2


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within it no parameter of the module enters a graph; afterwards each is as it was."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def adaptive_weight(reconstruction: Sequence[Tensor], adversarial: Sequence[Tensor]) -> Tensor:
    """A scalar without gradient, up to 1e4: |reconstruction| / (|adversarial| + 1e-4), norms over all
    tensors.

    VQGAN (Esser et al. 2021), equation 7. The arguments are the gradients of the two losses, batch means,
    at the decoder's last layer. On N processes give the gradients averaged over them: a norm of a mean is
    not the mean of the norms.
    """
    ratio = _norm_of(reconstruction) / (_norm_of(adversarial) + SMALLEST_GRADIENT)
    return ratio.clamp(max=LARGEST_ADAPTIVE_WEIGHT).detach()


def _norm_of(gradients: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]))


@dataclass(frozen=True)
class DiscriminatorHealth:
    """Running means over about the last 200 discriminator steps; plain numbers, so a checkpoint can hold
    them."""

    steps: int = 0
    """Discriminator steps so far."""
    accuracy: float = 0.5
    """Share of patches judged rightly."""
    logit_real: float = 0.0
    """Mean logit of real images."""
    logit_fake: float = 0.0
    """Mean logit of reconstructions."""

    def updated(self, accuracy: float, logit_real: float, logit_fake: float) -> "DiscriminatorHealth":
        """With the batch means of one more step; on N processes give their averages."""
        keep = min(self.steps / (self.steps + 1), 0.995)  # a plain mean first, then one over about 200 steps

        def mix(old: float, new: float) -> float:
            return keep * old + (1 - keep) * new

        return DiscriminatorHealth(
            self.steps + 1,
            mix(self.accuracy, accuracy),
            mix(self.logit_real, logit_real),
            mix(self.logit_fake, logit_fake),
        )


def collapse_alarm(config: DiscriminatorConfig, health: DiscriminatorHealth) -> str | None:
    """What is wrong with the discriminator and what to change, one sentence; None where it is well or it is early."""
    if health.steps < config.alarm_after_steps:
        return None
    if max(abs(health.logit_real), abs(health.logit_fake)) > config.alarm_logit:
        return (
            f"the discriminator diverges: its mean logits are {health.logit_real:.3g} (real) and "
            f"{health.logit_fake:.3g} (fake), discriminator.alarm_logit is {config.alarm_logit:g}; lower "
            "discriminator.lr"
        )
    if health.accuracy > config.alarm_accuracy:
        return (
            f"the discriminator has won: it judges {health.accuracy:.1%} of the patches rightly, and the "
            "codec learns nothing from it; lower discriminator.lr or discriminator.channels"
        )
    if health.accuracy < config.alarm_chance:
        return (
            f"the discriminator has learned nothing: it judges {health.accuracy:.1%} of the patches rightly, "
            "a coin 50.0%; raise discriminator.lr or set discriminator.weight to 0"
        )
    return None
