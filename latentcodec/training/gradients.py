"""From the micro-batches of a step to its gradients: forward and backward of the codec, and of its discriminator.

Nothing here moves a weight. Gradients of all processes are averaged by the last backward pass of a step, since only
what runs inside the prepared model's forward is synchronised.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentcodec.latents import decode_raw, posterior_parameters
from latentcodec.ops.functional import fastest_kernels
from latentcodec.training.data.crops import Batch
from latentcodec.training.losses.adversary import Adversary
from latentcodec.training.losses.objective import Objective
from latentcodec.training.losses.teacher import Teacher
from latentcodec.training.losses.terms import objective
from latentcodec.training.optim.schedule import TrainConfig
from latentcodec.training.progress import phase
from latentcodec.training.state import TrainState
from latentcodec.training.watchdog import GRADIENTS, doing
from latentcodec.vae.posterior import mean_and_logvar


class Gradients:
    """What computes the gradients of a run, on `accelerator`; images in the memory format `layout`."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        objective: Objective,
        teacher: Teacher | None,
        accelerator: Accelerator,
        layout: torch.memory_format,
    ) -> None:
        self.config, self.state, self.objective, self.teacher = config, state, objective, teacher
        self.accelerator, self.layout = accelerator, layout
        self.model: nn.Module = accelerator.prepare(state.codec)
        self.parameters = [p for p in state.codec.parameters() if p.requires_grad]

    def compile(self) -> None:
        """Before the first step, compile what training runs on, once on a machine.

        A signal to all processes of a run would end compilers too, and a step would go on with other roundings.
        """
        with phase("compiling the native functions, once on a machine"):
            fastest_kernels(self.accelerator.device.type)

    def compute(self, micro_batches: list[Batch], adversary: Adversary | None) -> dict[str, Tensor]:
        """Fill the gradients of the step, unscaled and clipped; returns its losses by name, means of this process.

        `adversary`: the discriminator, where it takes part in this step.
        """
        self.model.train()
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                for name, value in self._backward(batch, adversary, last).items():
                    sums[name] = sums.get(name, 0) + value.detach() / len(micro_batches)
        optimizers = [player.optimizer for player in (self.state, adversary) if player is not None]
        self.accelerator.unscale_gradients(optimizers)  # of fp16; Accelerate would unscale the idle ones too
        sums["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        if adversary:
            sums["d_grad_norm"] = adversary.gradient_norm()
        return sums

    def drop(self, adversary: Adversary | None) -> None:
        """Forget the gradients of a step, taken or skipped."""
        self.state.optimizer.zero_grad(set_to_none=True)
        if adversary:
            adversary.drop_gradients()

    def _backward(self, batch: Batch, adversary: Adversary | None, last: bool) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; returns its losses, batch means, without gradient."""
        state, accumulation = self.state, self.config.accumulation
        doing(GRADIENTS if last and self.accelerator.num_processes > 1 else "computing gradients")
        x = batch["pixels"].to(self.accelerator.device, non_blocking=True, memory_format=self.layout)
        inputs = self.objective.inputs(x, batch["position"], state.draw, self._recode)
        lesson, inputs = self.teacher.lesson(inputs) if self.teacher else (None, inputs)
        result = self.model(inputs.x, inputs.noise, inputs.transform)
        losses, weights = self.objective.losses(
            result, inputs, state.step, state.draw, self._decode, self._encode
        )
        if lesson:
            losses, weights = losses | lesson.losses(result), weights | lesson.weights
        total = objective(losses, weights, inputs.target[0].numel())
        report = {name: value.detach().mean() for name, value in losses.items()}
        if adversary:
            adversarial = adversary.generator(result.reconstruction)
            last_layer = state.codec.vae.decoder.conv_out.weight
            total = total + adversary.weight(total, adversarial, last_layer, accumulation) * adversarial
            report["adversarial"] = adversarial.detach()
        self.accelerator.backward(total / accumulation)
        if adversary:
            report |= adversary.backward(inputs.target, result.reconstruction, accumulation, last)
        return {"total": total, **report, **self.objective.measures(result, report["nll"], inputs.target)}

    def _decode(self, z: Tensor) -> Tensor:
        """Raw latents -> images, outside the model's forward, under the same autocast."""
        with self.accelerator.autocast():
            return decode_raw(self.state.codec.vae, z)

    def _encode(self, y: Tensor) -> Tensor:
        """The posterior's mean of images, under the same autocast."""
        with self.accelerator.autocast():
            return mean_and_logvar(posterior_parameters(self.state.codec.vae, y))[0]

    def _recode(self, x: Tensor) -> Tensor:
        """Images as they come back from the codec, not clamped."""
        return self._decode(self._encode(x)).float()
