"""A frozen codec in whose latent space another one is trained: distillation, or an anchor while fine-tuning.

The student's posterior is held to the teacher's by two losses; its decoder is trained on its own latents or on the
teacher's. The saved student takes the numbers that normalise the teacher's latents, so it can stand in the
teacher's place in any pipeline. How far it is off, the drift, is measured over the training crops.

Gradients flow through what the trained module's forward returns, so data parallelism synchronises them.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.latents import LatentSpace, posterior_parameters
from latentcodec.training.losses.sample import ForwardPass, Inputs
from latentcodec.vae.families import FLUX2
from latentcodec.vae.posterior import mean_and_logvar, sample_posterior

# The spread matters less than the place, and diffusion models look at the mode; but nothing else would hold the
# student's log-variance where its decoder sees the teacher's latents.
DEVIATION_SHARE = 0.01

BATCH = 8  # images of the start that the teacher encodes at once


@dataclass(frozen=True)
class Lesson:
    """The teacher's posterior of one micro-batch."""

    mean: Tensor
    """[B, c, h, w] float32."""
    logvar: Tensor
    """[B, c, h, w] float32."""
    space: LatentSpace
    """Whose deviations are the units of distance."""
    weights: dict[str, float]
    """The factor of each of `losses`."""

    def losses(self, result: ForwardPass) -> dict[str, Tensor]:
        """anchor and anchor_deviation, [B] each, means over an image's latent elements."""
        return {
            "anchor": anchor_loss(self.space.pack(result.mean), self.space.pack(self.mean), self.space.std),
            "anchor_deviation": deviation_loss(result.logvar, self.logvar),
        }


def anchor_loss(mean: Tensor, target: Tensor, unit: Tensor) -> Tensor:
    """[B]: the squared distance of two latents [B, c, h, w] in units [c, 1, 1], a mean per element."""
    return ((mean - target) / unit).square().flatten(1).mean(1)


def deviation_loss(logvar: Tensor, target: Tensor) -> Tensor:
    """[B]: the squared difference of the posteriors' log standard deviations, a mean per element."""
    return ((logvar - target) / 2).square().flatten(1).mean(1)


class Teacher:
    """The frozen codec, on one device."""

    def __init__(self, codec: LatentCodec, weight: float, gives_latents: bool, bfloat16: bool) -> None:
        codec.vae.requires_grad_(False)
        self.codec, self.gives_latents = codec, gives_latents
        self.weights = {"anchor": weight, "anchor_deviation": weight * DEVIATION_SHARE}
        # Never float16, in which the VAEs that one wants to distil may overflow.
        self.autocast = torch.autocast(codec.device.type, torch.bfloat16, enabled=bfloat16)

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, c, h, w] float32 of pixels [B, C, H, W]."""
        with self.autocast:
            parameters = posterior_parameters(self.codec.vae, x.to(self.codec.device))
        return mean_and_logvar(parameters)

    def latents(self, images: Sequence[Tensor]) -> Tensor:
        """[N, c, h, w] float32 on the CPU: the posterior's means of images [C, H, W] of one size, a few at a time."""
        return torch.cat([self.posterior(x)[0].cpu() for x in torch.stack(list(images)).split(BATCH)])

    def lesson(self, inputs: Inputs) -> tuple[Lesson, Inputs]:
        """The posterior to be reached for these inputs, and the inputs, with the teacher's latents if it gives them."""
        mean, logvar = self.posterior(inputs.x)
        if self.gives_latents:
            latent = sample_posterior(mean, logvar, inputs.noise)
            inputs = replace(inputs, transforms=[lambda _: latent, *inputs.transforms])
        return Lesson(mean, logvar, LatentSpace.of(self.codec.vae), self.weights), inputs

    def hand_over(self, vae: AutoencoderKL) -> None:
        """Give `vae` the numbers that normalise the teacher's latents. Raises ValueError where it cannot use them."""
        ours, theirs = LatentCodec(vae), self.codec
        if ours.family != theirs.family:
            raise ValueError(
                f"model.teacher is a {theirs.family.name}, the codec to be trained a {ours.family.name}: they cannot "
                "share a latent space"
            )
        for key in ("image_channels", "latent_channels", "downsampling_factor"):
            its, own = getattr(theirs, key), getattr(ours, key)
            if its != own:
                raise ValueError(
                    f"model.teacher has {key} {its}, the codec to be trained has {own}: they cannot share a "
                    "latent space"
                )
        vae.register_to_config(**{key: theirs.vae.config[key] for key in theirs.family.normalisation})
        if theirs.family == FLUX2:
            vae.bn.load_state_dict(theirs.vae.bn.state_dict())

    def drift(
        self,
        vae: AutoencoderKL,
        batches: Iterable[Tensor],
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> Drift:
        """How far the posterior's mean of `vae` is from the teacher's over `batches` [B, C, H, W]; float64 sums.

        `total` adds the sums up over the processes.
        """
        space = LatentSpace.of(self.codec.vae)
        sums = torch.zeros(7, self.codec.latent_channels, dtype=torch.float64, device=self.codec.device)
        for x in batches:
            with torch.no_grad(), self.autocast:
                student = mean_and_logvar(posterior_parameters(vae, x))[0]
            pair = torch.stack([space.normalise(raw) for raw in (student, self.posterior(x)[0])])
            s, t = rearrange(pair, "two b c h w -> two c (b h w)").double()
            products = [torch.ones_like(s), s, t, s * s, t * t, s * t, (s - t).square()]
            sums += torch.stack(products).sum(-1)
        if total is not None:
            sums = total(sums)
        _, s, t, ss, tt, st, difference = (sums / sums[0]).cpu()
        covariance, variances = st - s * t, (ss - s * s) * (tt - t * t)
        return Drift(
            rms=difference.mean().sqrt().item(),
            correlation=(covariance / variances.clamp(min=1e-24).sqrt()).tolist(),
        )


@dataclass(frozen=True)
class Drift:
    """The distance of a student's latents from its teacher's."""

    rms: float
    """Root of the mean squared difference, in units of the deviation of the teacher's latents."""
    correlation: list[float]
    """By channel, between the student's latents and the teacher's."""

    def record(self) -> dict[str, Any]:
        """What metrics.jsonl says."""
        return {"latent_drift": self.rms, "latent_correlation": self.correlation}

    def card(self, teacher: str) -> str:
        """Markdown for the model card."""
        correlations = ", ".join(f"{value:.4f}" for value in self.correlation)
        return (
            f"## Latents\n\nTrained into the latent space of `{teacher}`, whose scale and shift it has. Over the "
            f"training crops its latents are off by {self.rms:.4f} of the teacher's standard deviation (root mean "
            f"square); correlation by channel: {correlations}."
        )
