"""The training step and everything a run must remember between two of them.

`train/train.py` reads the loop aloud; each of its lines is a method here. What of it survives a restart is in
`memory.py`, what is measured outside the steps in `survey.py`; how weights move, what the losses are and who writes
them down have files of their own.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.ops.functional import fastest_kernels
from latentcodec.quality.metrics import Evaluation, evaluate, reconstruct
from latentcodec.training import state as memory
from latentcodec.training import survey
from latentcodec.training.checkpoint import prune
from latentcodec.training.data.crops import Batch
from latentcodec.training.data.stream import held_out, open_images, training_batches
from latentcodec.training.export.codec_folder import finish, write_codec
from latentcodec.training.hardware import settled, take_hardware
from latentcodec.training.journal import Journal
from latentcodec.training.losses.adversary import Adversary
from latentcodec.training.losses.objective import Objective
from latentcodec.training.losses.teacher import Teacher
from latentcodec.training.losses.terms import objective
from latentcodec.training.optim.muon import Muon
from latentcodec.training.optim.schedule import (
    ema_decay,
    learning_rate,
    parameter_groups,
    update_ema,
)
from latentcodec.training.preflight import (
    check_held_out,
    find_checkpoint,
    new_accelerator,
    new_processes,
    newest_checkpoint,
    smallest_crop,
)
from latentcodec.training.progress import counted, phase
from latentcodec.training.signals import StopRequest
from latentcodec.training.start.model import TrainedCodec, image_channels, load_parent, new_vae
from latentcodec.vae.networks import downsampling_factor

if TYPE_CHECKING:
    from latentcodec.training.config import Config

BAD_STEPS_BEFORE_ROLLBACK = 3
ROLLBACKS_BEFORE_GIVING_UP = 3


class Trainer:
    """One run: built from its configuration, resumed from its checkpoints, stepped, validated, finished."""

    def __init__(self, config: Config) -> None:
        self.output = Path(config.output_dir)
        processes = new_processes()
        self.found = find_checkpoint(config, processes)
        self.hardware = take_hardware(config, self.found, processes)
        self.config = config = settled(config, self.hardware)
        train = config.train
        self.accelerator = new_accelerator(config, self.hardware.precision)
        device = self.accelerator.device
        self.journal = Journal(self.output, self.accelerator, config)
        for note in self.hardware.notes:
            self.journal.say(note)
        parent = load_parent(config.model)
        self.teacher = Teacher.of(config.model, device, self.hardware.precision == "bf16")
        channels = image_channels(config.model, parent)
        f = downsampling_factor(asdict(config.model) if parent is None else parent.config)
        smallest = smallest_crop(config, f)
        torch.manual_seed(train.seed)  # the weights that no closed form sets
        self.adversary = Adversary.of(config.discriminator, channels, smallest, self.accelerator)
        self.images = open_images(config.data, channels, train.seed)
        self.held_out = held_out(self.images)
        check_held_out(self.held_out)
        # A start from the data would only be overwritten by what was found.
        start = config.model if self.found is None else replace(config.model, init="default")
        vae = new_vae(start, parent, self.teacher, partial(survey.start_crops, self.images))
        self.layout = torch.channels_last if train.channels_last else torch.contiguous_format
        self.codec = TrainedCodec(vae, config.loss.scale, config.loss.learn_scale)
        self.codec.to(device).to(memory_format=self.layout)
        self.ema = copy.deepcopy(vae).requires_grad_(False).eval()
        self.parameters = [p for p in self.codec.parameters() if p.requires_grad]
        groups = parameter_groups(self.codec, train.weight_decay)
        self.optimizer = Muon(groups, betas=train.betas, fused=True)
        self.model = self.accelerator.prepare(self.codec)
        self.objective = Objective(config, int(vae.config.latent_channels), f, device)
        self.step, self.draw = 0, 0  # optimizer steps taken, global batches consumed (skipped ones too)
        self.committed = -1  # the step of the newest checkpoint
        self.seconds = 0.0  # of training, over all sittings
        self.stopped_by = 0  # the signal that ended this sitting
        self.bad_steps = self.rollbacks = 0  # in a row, and since the last new checkpoint

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
        self._exchanged = time.perf_counter()
        stream = iter(self.batches)
        while not self.over:
            self._began, self._waited_before = time.perf_counter(), self.batches.waited_seconds
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

    @property
    def finished(self) -> bool:
        """Whether an earlier sitting has brought this run to its end, codec and all."""
        return self.progress >= 1 and self.journal.finished_step() == self.step

    def due(self, every: int) -> bool:
        """Whether this step is one of every `every`; never for 0, nor at the end, which does everything anyway."""
        return every > 0 and self.step % every == 0 and self.progress < 1

    def train_step(self, micro_batches: list[Batch]) -> dict[str, float] | None:
        """One optimizer step over the micro-batches of all processes; returns what the journal writes.

        None if a loss or a gradient was not finite on any process: then nothing has changed, and the batch is listed.
        """
        self.model.train()
        adversary = self.adversary if self.adversary and self.adversary.active(self.step) else None
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                for name, value in self._backward(batch, adversary, last).items():
                    sums[name] = sums.get(name, 0) + value.detach() / len(micro_batches)
        optimizers = [player.optimizer for player in (self, adversary) if player is not None]
        self.accelerator.unscale_gradients(optimizers)  # of fp16; Accelerate would unscale the idle ones too
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip_norm)
        if adversary:
            sums["d_grad_norm"] = adversary.gradient_norm()
        report = self._exchange(sums, [line for batch in micro_batches for line in batch["rejected"]])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        bad = [name for name, value in report.items() if not math.isfinite(value)]
        if bad:
            self._skip(bad)
        else:
            report |= self._move_weights(report, adversary)
        self.draw += 1
        self.optimizer.zero_grad(set_to_none=True)
        if adversary:
            adversary.forget()
        return None if bad else report | self._timing(len(micro_batches))

    def validate(self) -> Evaluation | None:
        """Score the averaged weights on the held-out images and draw some of them; None without such images."""
        evaluation = None
        if self.accelerator.is_main_process and self.held_out.images:
            codec = LatentCodec(self.ema)
            images = [image.to(self.accelerator.device) for image in self.held_out.images]
            evaluation = evaluate(codec, counted(images, "validating", len(images), "image"))
            self.journal.validated(self.step, self.seconds, evaluation)
            self.journal.samples(
                self.step, [(image, reconstruct(codec, image[None])[0]) for image in images[:6]]
            )
        self.accelerator.wait_for_everyone()
        return evaluation

    def checkpoint(self) -> None:
        """Commit everything that must survive a restart; a step that is committed already is left alone."""
        if self.step == self.committed:
            return
        if self.accelerator.is_main_process:
            memory.save(self)
        self.committed, self.rollbacks = self.step, 0
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the newest checkpoint that verifies; a new run commits one of its start."""
        if self.found is None:
            self.checkpoint()
        else:
            self.found.require_same({"ema": self.ema.state_dict()}, {})
            memory.load(self, self.found)
            if self.accelerator.is_main_process:
                prune(self.found.path.parent, self.found.path, self.config.train.keep_last)
            self.draw, self.seconds = self.found.state["draw"], self.found.state["seconds"]
        if not self.finished:
            with phase("compiling the native functions, once on a machine"):
                fastest_kernels(self.accelerator.device.type)
            self.journal.begin(self.step, self.draw, self.progress >= 1)
            self.journal.rejected(self.held_out.rejected)

    def finish(self) -> None:
        """The end of a complete run: its score and its codec."""
        evaluation = self.validate()
        self.save_codec(evaluation)
        self.journal.finish(self.step, self.seconds, evaluation)

    def save_codec(self, evaluation: Evaluation | None = None) -> None:
        """Write codec/: the averaged weights, finished; those of a complete run with the precision certificate."""
        moments, drift = survey.moments(self), survey.drift(self)
        if self.accelerator.is_main_process:
            vae, settings = copy.deepcopy(self.ema), self.config.finish
            count = settings.certificate_images if self.progress >= 1 else 0
            crops = survey.start_crops(self.images)[:count] if count else []
            sections = [self.journal.card(self, evaluation), finish(vae, settings, moments, crops)]
            if drift is not None:
                self.journal.drifted(self.step, drift)
                sections.append(drift.card(str(self.config.model.teacher)))
            codec = LatentCodec(vae)
            card = codec.model_card("\n\n".join(filter(None, sections)))
            write_codec(codec, self.output / "codec", card)
        self.accelerator.wait_for_everyone()

    # ---- the step --------------------------------------------------------------------------------------------

    def _backward(self, batch: Batch, adversary: Adversary | None, last: bool) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; returns its losses, batch means, without gradient."""
        x = batch["pixels"].to(self.accelerator.device, non_blocking=True, memory_format=self.layout)
        inputs = self.objective.inputs(x, batch["position"], self.draw)
        lesson, inputs = self.teacher.lesson(inputs) if self.teacher else (None, inputs)
        result = self.model(inputs.x, inputs.noise, inputs.transform)
        losses, weights = self.objective.losses(result, inputs, self.step, self.draw, self._decode)
        if lesson:
            losses, weights = losses | lesson.losses(result), weights | lesson.weights
        total = objective(losses, weights, inputs.target[0].numel())
        report = {name: value.detach().mean() for name, value in losses.items()}
        accumulation = self.config.train.accumulation
        if adversary:
            adversarial = adversary.generator(result.reconstruction)
            last_layer = self.codec.vae.decoder.conv_out.weight
            total = total + adversary.weight(total, adversarial, last_layer, accumulation) * adversarial
            report["adversarial"] = adversarial.detach()
        self.accelerator.backward(total / accumulation)
        if adversary:
            report |= adversary.backward(inputs.target, result.reconstruction, accumulation, last)
        return {"total": total, **report, **self.objective.measures(result, report["nll"], inputs.target)}

    def _decode(self, z: Tensor) -> Tensor:
        """A second decoding in the same step, under the same autocast as the first."""
        with self.accelerator.autocast():
            return self.codec.vae.decode(z).sample

    def _exchange(self, sums: dict[str, Tensor], rejected: list[str]) -> dict[str, float]:
        """What all processes must know of each other's step, in one exchange: the means of the losses, the time,
        a request to stop, whether any image was rejected, and the longest wait for data, which holds up all."""
        now = time.perf_counter()
        waited = self.batches.waited_seconds - self._waited_before
        notes = [now - self._exchanged, float(self.stop.received), float(len(rejected)), waited]
        self._exchanged = now
        device = self.accelerator.device
        row = torch.cat(
            [torch.stack([v.detach().float() for v in sums.values()]), torch.tensor(notes, device=device)]
        )
        table = self.accelerator.gather(row[None])  # [processes, numbers]
        *means, seconds, _, _, _ = table.mean(0).tolist()
        *_, stopped_by, any_rejected, self._waited = table.amax(0).tolist()
        self.seconds += seconds
        self.stopped_by = int(stopped_by)
        if any_rejected:
            self.journal.rejected(gather_object(rejected))
        return dict(zip(sums, means, strict=True))

    def _move_weights(self, report: dict[str, float], adversary: Adversary | None) -> dict[str, float]:
        """Everything that a good step changes; returns what there is to say of it."""
        train = self.config.train
        lr = learning_rate(train.lr, train.schedule, max(self.progress, 1 / train.max_steps), train.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
        said = {"lr": lr} if adversary is None else {"lr": lr} | adversary.step(report)
        update_ema(self.ema, self.codec.vae, ema_decay(train.ema_decay, self.step))
        said |= self.objective.after_step(self.step, report)
        self.step += 1
        self.bad_steps = 0
        return said

    def _skip(self, bad: list[str]) -> None:
        """List the batch; after three in a row go back to the last checkpoint, but not back in the stream."""
        self.journal.skipped(self.step, self.draw, bad)
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1 and {*bad} <= {"grad_norm", "d_grad_norm"}:
            return  # the usual search of fp16 for its scale, which the scaler has just halved
        self.bad_steps += 1
        if self.bad_steps < BAD_STEPS_BEFORE_ROLLBACK:
            return
        self.rollbacks += 1
        saved = newest_checkpoint(self.output / "checkpoints", self.accelerator)
        assert saved is not None  # a run begins with one
        if self.rollbacks > ROLLBACKS_BEFORE_GIVING_UP:
            raise ValueError(
                f"training diverges: {self.rollbacks} times since the checkpoint {saved.path}, which is untouched, "
                f"{BAD_STEPS_BEFORE_ROLLBACK} steps in a row were not finite; lower train.lr "
                f"({self.config.train.lr:g}), or look at the batches in {self.output / 'skipped.jsonl'}"
            )
        self.journal.rolled_back(self.step, saved.step)
        memory.load(self, saved)
        self.bad_steps = 0

    def _timing(self, micro_batches: int) -> dict[str, float]:
        """How long the step took, how much of that it waited for data, and the minutes of the run so far."""
        seconds = time.perf_counter() - self._began
        images = self.config.train.batch_size * micro_batches * self.accelerator.num_processes
        return {
            "images_per_second": images / seconds,
            "step_seconds": seconds,
            "waited_seconds": self._waited,
            "minutes": self.seconds / 60,
        }
