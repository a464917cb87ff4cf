"""The training step and everything a run must remember between two of them.

`train/train.py` reads the loop aloud; each of its lines is a method here. What must survive a restart is what
`checkpoint` saves: weights, moving average, optimizer states and a few numbers. There is no random state among
them, since every draw is a function of (seed, position in the stream); see `randomness.py`.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.metrics import Evaluation, evaluate, reconstruct
from latentcodec.training import checkpoint as checkpoints
from latentcodec.training.adversary import Adversary
from latentcodec.training.crops import Batch
from latentcodec.training.data import held_out, open_images, training_batches
from latentcodec.training.journal import Journal
from latentcodec.training.losses import objective
from latentcodec.training.model import TrainedCodec, new_vae
from latentcodec.training.objective import Objective
from latentcodec.training.optimization import ema_decay, learning_rate, parameter_groups, update_ema
from latentcodec.training.signals import StopRequest

if TYPE_CHECKING:
    from latentcodec.training.config import Config

START_CROPS = 64  # for the linear start: more change its PSNR by less than 0.1 dB
BAD_STEPS_BEFORE_ROLLBACK = 3
ROLLBACKS_BEFORE_GIVING_UP = 3


@dataclass
class TrainConfig:
    """How long, how fast, how often."""

    max_steps: int = 1000
    """Optimizer steps of the run."""
    max_minutes: float | None = None
    """End after this much training time even if max_steps is not reached; the schedule follows the nearer end. A
    run that stops by the clock cannot be repeated bit by bit."""
    batch_size: int = 16
    """Crops per process and micro-batch."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    seed: int = 0
    """Of everything random: weights, order, crops, noise."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging factors."""
    weight_decay: float = 1e-4
    """AdamW's decay, of convolution and projection weights only."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: float = 0.02
    """Share of the run over which the learning rate rises from 0."""
    clip_norm: float = 1.0
    """Largest gradient norm, of the objective in nats per pixel-channel."""
    ema_decay: float = 0.999
    """Decay per step of the averaged weights, the ones that are validated and saved."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Autocast of the network over float32 weights. None: as `accelerate launch` was told."""
    channels_last: bool = True
    """Memory layout of weights and images; faster on tensor cores and CPUs with bf16 units."""
    validate_every: int = 250
    """Steps between two validations (with a sample grid); 0: only at the end."""
    checkpoint_every: int = 250
    """Steps between two checkpoints; each also refreshes codec/."""
    keep_last: int = 2
    """Checkpoints to keep."""
    statistics_images: int = 512
    """Crops over which mean and deviation of the latents are measured for codec/."""
    trackers: list[str] | None = None
    """Accelerate's trackers to report to, such as tensorboard or wandb; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        for key in (
            "max_steps",
            "batch_size",
            "accumulation",
            "checkpoint_every",
            "keep_last",
            "statistics_images",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"train.{key} must be at least 1, not {getattr(self, key)}")


class Trainer:
    """One run: built from its configuration, resumed from its checkpoints, stepped, validated, finished."""

    def __init__(self, config: Config) -> None:
        self.config = config
        train = config.train
        self.output = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=train.mixed_precision, log_with=train.trackers, project_dir=self.output
        )
        self.images = open_images(config.data, config.model.image_channels, train.seed)
        torch.manual_seed(train.seed)  # the weights that no closed form sets
        vae = new_vae(config.model, self._start_crops)
        layout = torch.channels_last if train.channels_last else torch.contiguous_format
        codec = TrainedCodec(vae, config.loss.scale, config.loss.learn_scale)
        codec = codec.to(self.accelerator.device).to(memory_format=layout)
        self.ema = copy.deepcopy(codec.vae).requires_grad_(False).eval()
        self.parameters = [p for p in codec.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameter_groups(codec, train.weight_decay), betas=train.betas, fused=True
        )
        self.model, self.optimizer = self.accelerator.prepare(codec, optimizer)
        self.codec: TrainedCodec = self.accelerator.unwrap_model(self.model)
        self.layout = layout
        self.latent_channels = int(vae.config.latent_channels)
        f = self.codec.downsampling_factor
        self.objective = Objective(config, self.latent_channels, f, self.accelerator.device)
        self.adversary = Adversary.of(config.discriminator, config.model.image_channels, self.accelerator)
        self.held_out = held_out(self.images)
        self.journal = Journal(self.output, self.accelerator, config)
        self.step, self.draw = 0, 0  # optimizer steps taken, global batches consumed (skipped ones too)
        self.committed = -1  # the step of the newest checkpoint
        self.seconds = 0.0  # of training, over all sittings
        self.stopped_by = 0  # the signal that ended this sitting
        self.bad_steps = self.rollbacks = 0

    # ---- the loop's vocabulary -------------------------------------------------------------------------------

    def steps(self, stop: StopRequest) -> Iterator[list[Batch]]:
        """The micro-batches of each step until the run is complete, its time is over or somebody asked to stop."""
        train, accelerator = self.config.train, self.accelerator
        self.batches = training_batches(
            self.images,
            train.batch_size,
            accumulation=train.accumulation,
            start_step=self.draw,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
        )
        self.stop = stop
        stream = iter(self.batches)
        while not self.over:
            yield [next(stream) for _ in range(train.accumulation)]

    @property
    def over(self) -> bool:
        """Whether the run is complete, or was asked to stop."""
        return self.progress >= 1 or bool(self.stopped_by)

    @property
    def progress(self) -> float:
        """Share of the run that is done: of its steps or of its time, whichever is further."""
        train = self.config.train
        by_time = 0.0 if train.max_minutes is None else self.seconds / 60 / train.max_minutes
        return min(1.0, max(self.step / train.max_steps, by_time))

    def due(self, every: int) -> bool:
        """Whether this step is one of every `every`; never for 0, nor at the end, which does everything anyway."""
        return every > 0 and self.step % every == 0 and not self.over

    def train_step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimizer step over the micro-batches of all processes; returns what the journal writes.

        A loss or gradient that is not finite, on any process, changes nothing: the step is skipped and listed.
        """
        began = time.perf_counter()
        self.model.train()
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(micro_batches):
            waits = index < len(micro_batches) - 1
            with self.accelerator.no_sync(self.model) if waits else nullcontext():
                for name, value in self._backward(batch, last=not waits).items():
                    sums[name] = sums.get(name, 0) + value.detach() / len(micro_batches)
        sums["grad_norm"] = torch.as_tensor(
            self.accelerator.clip_grad_norm_(self.parameters, self.config.train.clip_norm)
        )
        report = self._reduce(sums)
        self.draw += 1
        if self._finite(report):
            self._move_weights(report)
        else:
            self._skip(micro_batches, report)
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds += report.pop("clock")
        elapsed = time.perf_counter() - began
        images = self.config.train.batch_size * len(micro_batches) * self.accelerator.num_processes
        return report | {"images_per_second": images / elapsed, "lr": self.optimizer.param_groups[0]["lr"]}

    def validate(self) -> Evaluation | None:
        """Score the averaged weights on the held-out images and draw some of them; None without such images."""
        evaluation = None
        if self.accelerator.is_main_process and self.held_out.images:
            codec = LatentCodec(self.ema)
            images = [image.to(self.accelerator.device) for image in self.held_out.images]
            evaluation = evaluate(codec, images)
            self.journal.validated(self.step, self.seconds, evaluation)
            self.journal.samples(
                self.step, [(image, reconstruct(codec, image[None])[0]) for image in images[:6]]
            )
        self.accelerator.wait_for_everyone()
        return evaluation

    def checkpoint(self) -> None:
        """Commit everything that must survive a restart; a step that is committed already is left alone."""
        if self.accelerator.is_main_process and self.step != self.committed:
            checkpoints.save(
                self.output / "checkpoints",
                self.step,
                tensors=self._tensors(),
                objects=self._objects(),
                state=self._state(),
                keep_last=self.config.train.keep_last,
            )
        self.committed = self.step
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the newest checkpoint that verifies; a new run commits one of its start."""
        folder = self.output / "checkpoints"
        if self.accelerator.is_main_process:
            checkpoints.prepare(folder)
        self.accelerator.wait_for_everyone()
        saved = checkpoints.newest(folder)
        if saved is None:
            self.checkpoint()
        else:
            saved.require_same({"ema": self.ema.state_dict()}, {"seed": self.config.train.seed})
            self._load(saved)
            self.draw, self.committed = int(saved.state["draw"]), saved.step
        self.journal.begin(self.step)

    def save_codec(self, evaluation: Evaluation | None = None) -> None:
        """Write codec/: the averaged weights, with the latents' statistics over the training data in its config."""
        mean, std = self._latent_statistics()
        if self.accelerator.is_main_process:
            vae = copy.deepcopy(self.ema)
            vae.register_to_config(
                latents_mean=mean.tolist(),
                latents_std=std.tolist(),
                shift_factor=mean.mean().item(),
                scaling_factor=1 / (std.square() + (mean - mean.mean()).square()).mean().sqrt().item(),
            )
            codec = LatentCodec(vae)
            codec.save_pretrained(
                self.output / "codec", codec.model_card(self.journal.card(self, evaluation))
            )
        self.accelerator.wait_for_everyone()

    # ---- the step --------------------------------------------------------------------------------------------

    def _backward(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; returns its losses, batch means, without gradient."""
        self.journal.rejected(batch["rejected"])
        x = batch["pixels"].to(self.accelerator.device, non_blocking=True, memory_format=self.layout)
        inputs = self.objective.inputs(x, batch["position"], self.draw)
        result = self.model(inputs.x, inputs.noise, inputs.transform)
        losses, weights = self.objective.losses(result, inputs, self.step, self.draw, self._decode)
        total = objective(losses, weights, inputs.target[0].numel())
        report = {name: value.detach().mean() for name, value in losses.items()}
        adversary = self.adversary if self.adversary and self.adversary.active(self.step) else None
        accumulation = self.config.train.accumulation
        if adversary:
            adversarial = adversary.generator(result.reconstruction)
            last_layer = self.codec.vae.decoder.conv_out.weight
            total = total + adversary.weight(total, adversarial, last_layer) * adversarial
            report["adversarial"] = adversarial.detach()
        self.accelerator.backward(total / accumulation)
        if adversary:
            report |= adversary.backward(inputs.target, result.reconstruction, accumulation, last)
        return {"total": total, **report, **self.objective.measures(result, report["nll"], inputs.target)}

    def _decode(self, z: Tensor) -> Tensor:
        """A second decoding in the same step, under the same autocast as the first."""
        with self.accelerator.autocast():
            return self.codec.vae.decode(z).sample

    def _reduce(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Means over the processes in one exchange, with the clock and the request to stop (their maximum)."""
        now = time.perf_counter()
        clock = now - getattr(self, "_last_step", now)
        self._last_step = now
        values = [value.detach().float().to(self.accelerator.device) for value in sums.values()]
        vector = torch.stack([*values, torch.tensor(clock, device=self.accelerator.device)])
        vector = self.accelerator.reduce(vector, reduction="mean")
        stop = torch.tensor([float(self.stop.received)], device=self.accelerator.device)
        self.stopped_by = int(self.accelerator.gather(stop).max())
        return dict(zip([*sums, "clock"], vector.tolist(), strict=True))

    def _finite(self, report: dict[str, float]) -> bool:
        if self.accelerator.scaler is not None:  # fp16: the scaler itself skips overflows, and adapts to them
            return math.isfinite(report["total"])
        return math.isfinite(report["total"]) and math.isfinite(report["grad_norm"])

    def _move_weights(self, report: dict[str, float]) -> None:
        train = self.config.train
        lr = learning_rate(train.lr, train.schedule, max(self.progress, 1 / train.max_steps), train.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.adversary is not None and self.adversary.active(self.step):
            self.adversary.step(report)
        update_ema(self.ema, self.codec.vae, ema_decay(train.ema_decay, self.step))
        report |= self.objective.after_step(self.step, report)
        self.step += 1
        self.bad_steps = 0

    def _skip(self, micro_batches: list[Batch], report: dict[str, float]) -> None:
        """List the batch; after three in a row go back to the last checkpoint, but not back in the stream."""
        self.bad_steps += 1
        self.journal.skipped(
            self.step, self.draw, [p for batch in micro_batches for p in batch["position"].tolist()]
        )
        for name in [name for name in report if name.startswith("channel_")]:
            del report[name]
        if self.bad_steps < BAD_STEPS_BEFORE_ROLLBACK:
            return
        self.rollbacks += 1
        if self.rollbacks > ROLLBACKS_BEFORE_GIVING_UP:
            raise ValueError(
                f"training diverges: {self.rollbacks} times {BAD_STEPS_BEFORE_ROLLBACK} bad steps in a row; "
                f"lower train.lr ({self.config.train.lr}); the last good checkpoint is untouched"
            )
        saved = checkpoints.newest(self.output / "checkpoints")
        assert saved is not None  # a run begins with one
        self.journal.rolled_back(self.step, saved.step)
        self._load(saved)
        self.bad_steps = 0

    # ---- what survives a restart -----------------------------------------------------------------------------

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        groups = {"model": self.codec.state_dict(), "ema": self.ema.state_dict()}
        return groups | ({} if self.adversary is None else {"discriminator": self.adversary.state_dict()})

    def _objects(self) -> dict[str, Any]:
        objects = {"optimizer": self.optimizer.state_dict()}
        if self.adversary is not None:
            objects["discriminator_optimizer"] = self.adversary.optimizer.state_dict()
        if self.accelerator.scaler is not None:
            objects["scaler"] = self.accelerator.scaler.state_dict()
        return objects

    def _state(self) -> dict[str, Any]:
        return {
            "draw": self.draw,
            "seconds": self.seconds,
            "seed": self.config.train.seed,
            "rate": self.objective.rate.numbers(),
            "adversary": None if self.adversary is None else self.adversary.numbers(),
            "config": asdict(self.config),
        }

    def _load(self, saved: checkpoints.Checkpoint) -> None:
        self.codec.load_state_dict(saved.tensors("model"))
        self.ema.load_state_dict(saved.tensors("ema"))
        self.optimizer.load_state_dict(saved.object("optimizer"))
        if self.adversary is not None:
            self.adversary.load(saved)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.object("scaler"))
        self.step, self.seconds = saved.step, float(saved.state["seconds"])
        self.objective.rate.load(saved.state["rate"])

    # ---- the start and the finish ----------------------------------------------------------------------------

    def _start_crops(self) -> list[Tensor]:
        return list(next(iter(training_batches(self.images, START_CROPS, steps=1)))["pixels"])

    @torch.no_grad()
    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """[c] mean and [c] deviation of the posterior means over training crops of all processes, float64."""
        train, world = self.config.train, self.accelerator.num_processes
        steps = -(-train.statistics_images // (train.batch_size * world))
        sums = torch.zeros(2, self.latent_channels, dtype=torch.float64)
        cells = 0
        rank = self.accelerator.process_index
        for batch in training_batches(
            self.images, train.batch_size, steps=steps, rank=rank, world_size=world
        ):
            x = batch["pixels"].to(self.accelerator.device, memory_format=self.layout)
            with self.accelerator.autocast():
                mean = self.ema.encode(x).latent_dist.mode().double().cpu()
            sums += torch.stack([mean.sum((0, 2, 3)), mean.square().sum((0, 2, 3))])
            cells += mean[:, 0].numel()
        first, second = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").cpu() / (
            cells * world
        )
        return first, (second - first.square()).clamp(min=1e-12).sqrt()
