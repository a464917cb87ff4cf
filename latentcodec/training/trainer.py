"""One training run: its parts, how it resumes, and its step.

The loop around it is in `loop.py`. What a step changes is in `state.py`, how its gradients come about in
`gradients.py`, how weights move in `optim/`, what is scored and saved in `export/`, what is told to people in
`journal.py`.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object

from latentcodec.training import state as states
from latentcodec.training.checkpoint import prune
from latentcodec.training.config import Config
from latentcodec.training.data.crops import Batch
from latentcodec.training.data.images import held_out, open_images
from latentcodec.training.data.stream import first_crops, training_batches
from latentcodec.training.exchange import Exchange
from latentcodec.training.export.exporter import Exporter
from latentcodec.training.gradients import Gradients
from latentcodec.training.hardware import settled, take_hardware
from latentcodec.training.journal import Journal
from latentcodec.training.losses.adversary import Adversary
from latentcodec.training.losses.objective import Objective
from latentcodec.training.optim.schedule import ema_decay, learning_rate, update_ema
from latentcodec.training.preflight import (
    check_held_out,
    find_checkpoint,
    fixed_settings,
    new_accelerator,
    new_processes,
    newest_checkpoint,
    smallest_crop,
)
from latentcodec.training.signals import StopRequest
from latentcodec.training.start.model import image_channels, load_parent, load_teacher, new_vae
from latentcodec.vae.networks import downsampling_factor

BAD_STEPS_BEFORE_ROLLBACK = 3
ROLLBACKS_BEFORE_GIVING_UP = 3


class Diverged(RuntimeError):
    """Training does not recover from numbers that are not finite; the message says what to change."""


class Trainer:
    """One run: built from its configuration, resumed from its checkpoints, stepped, validated, saved."""

    def __init__(self, config: Config) -> None:
        self.output = Path(config.output_dir)
        processes = new_processes()
        self.found = find_checkpoint(config, processes)
        self.hardware = take_hardware(config, self.found, processes)
        self.config = config = settled(config, self.hardware)
        self.accelerator = accelerator = new_accelerator(config, self.hardware.precision)
        self.journal = Journal(self.output, accelerator, config)
        for note in self.hardware.notes:
            self.journal.say(note)
        parent = load_parent(config.model)
        teacher = load_teacher(config.model, accelerator.device, self.hardware.precision == "bf16")
        channels = image_channels(config.model, parent)
        f = downsampling_factor(asdict(config.model) if parent is None else parent.config)
        smallest = smallest_crop(config, f)
        torch.manual_seed(config.train.seed)  # the weights that no closed form sets
        adversary = Adversary.of(config.discriminator, channels, smallest, accelerator)
        self.images = open_images(config.data, channels, config.train.seed)
        self.held_out = held_out(self.images)
        check_held_out(self.held_out)
        # A start from the data would only be overwritten by what was found.
        start = config.model if self.found is None else replace(config.model, init="default")
        vae = new_vae(start, parent, teacher, partial(first_crops, self.images))
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        c, seed = int(vae.config.latent_channels), config.train.seed
        self.objective = Objective(config.loss, config.regularizer, seed, c, f, accelerator.device)
        self.state = states.new_state(config, vae, self.objective.rate, adversary, accelerator, layout)
        self.gradients = Gradients(config.train, self.state, self.objective, teacher, accelerator, layout)
        self.exporter = Exporter(
            config, self.state, teacher, self.images, self.held_out, self.journal, accelerator, layout
        )
        self.committed = -1  # the step of the newest checkpoint
        self.stopped_by = 0  # the signal that ended this start of the run

    # ---- what the loop asks for ------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the newest checkpoint that verifies; a new run commits one of its start."""
        state = self.state
        if self.found is None:
            self.checkpoint()
        else:
            self.found.require_same({"ema": state.ema.state_dict()}, {})
            state.load_state_dict(states.saved_state(self.found))
            self.committed = state.step
            if self.accelerator.is_main_process:
                prune(self.found.path.parent, self.found.path, self.config.train.keep_last)
        if not self.finished:
            self.gradients.compile()
            self.journal.begin(state.step, state.draw, self.progress >= 1)
            self.journal.rejected(self.held_out.rejects)

    def steps(self, stop: StopRequest) -> Iterator[list[Batch]]:
        """The micro-batches of each step until the run is complete, its time is over or it is asked to stop."""
        train, accelerator = self.config.train, self.accelerator
        batches = training_batches(
            self.images,
            train.batch_size,
            accumulation=train.accumulation,
            start_step=self.state.draw,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
        )
        self.exchange = Exchange(accelerator, batches, stop)
        stream = iter(batches)
        while self.progress < 1 and not self.stopped_by:
            self.exchange.begin_step()
            yield [next(stream) for _ in range(train.accumulation)]

    @property
    def progress(self) -> float:
        """Share of the run that is done: of its steps or of its time, whichever is further."""
        train, state = self.config.train, self.state
        by_time = 0.0 if train.max_minutes is None else state.seconds / 60 / train.max_minutes
        return min(1.0, max(state.step / train.max_steps, by_time))

    @property
    def finished(self) -> bool:
        """Whether an earlier start has brought this run to its end, codec and all."""
        return self.progress >= 1 and self.journal.finished_step() == self.state.step

    def due(self, every: int) -> bool:
        """Whether this step is one of every `every`; never for 0, nor at the end, which does everything anyway."""
        return every > 0 and self.state.step % every == 0 and self.progress < 1

    def checkpoint(self) -> None:
        """Commit everything that must survive a restart; a step that is committed already is left alone."""
        state, config = self.state, self.config
        if state.step == self.committed:
            return
        if self.accelerator.is_main_process:
            settings = fixed_settings(config)
            settings |= {"config": asdict(config), "machine": self.hardware.record()}
            states.save(state, self.output / "checkpoints", settings, config.train.keep_last)
        self.committed, state.rollbacks = state.step, 0
        self.accelerator.wait_for_everyone()

    # ---- the step --------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: list[Batch]) -> dict[str, float] | None:
        """One optimizer step over the micro-batches of all processes; returns what the journal writes.

        None if a loss or a gradient was not finite on any process: then nothing has changed, and the batch is listed.
        """
        state, adversary = self.state, self.state.adversary
        if adversary and not adversary.active(state.step):
            adversary = None
        sums = self.gradients.compute(micro_batches, adversary)
        rejects = [reject for batch in micro_batches for reject in batch["rejects"]]
        gathered = self.exchange.gather(sums, bool(rejects))
        state.seconds += gathered.seconds
        self.stopped_by = gathered.stopped_by
        if gathered.rejected:
            self.journal.rejected(gather_object(rejects))
        if state.scaler is not None:
            state.scaler.update()
        report = gathered.means
        bad = [name for name, value in report.items() if not math.isfinite(value)]
        if bad:
            self._skip(bad)
        else:
            report |= self._move_weights(report, adversary)
        state.draw += 1
        self.gradients.drop(adversary)
        images = len(micro_batches) * self.config.train.batch_size * self.accelerator.num_processes
        timing = self.exchange.timing(images, gathered) | {"minutes": state.seconds / 60}
        return None if bad else report | timing

    def _move_weights(self, report: dict[str, float], adversary: Adversary | None) -> dict[str, float]:
        """Everything that a step of finite numbers changes; returns what to report of it."""
        train, state = self.config.train, self.state
        lr = learning_rate(train.lr, train.schedule, max(self.progress, 1 / train.max_steps), train.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        state.optimizer.step()
        changes = {"lr": lr} if adversary is None else {"lr": lr} | adversary.step(report)
        update_ema(state.ema, state.codec.vae, ema_decay(train.ema_decay, state.step))
        changes |= self.objective.after_step(state.step, report)
        state.step += 1
        state.bad_steps = 0
        return changes

    def _skip(self, bad: list[str]) -> None:
        """List the batch; after three in a row go back to the last checkpoint, but not back in the stream."""
        state = self.state
        self.journal.skipped(state.step, state.draw, bad)
        scaler = state.scaler
        if scaler is not None and scaler.get_scale() >= 1 and {*bad} <= {"grad_norm", "d_grad_norm"}:
            return  # the usual search of fp16 for its scale, which the scaler has just halved
        state.bad_steps += 1
        if state.bad_steps < BAD_STEPS_BEFORE_ROLLBACK:
            return
        saved = newest_checkpoint(self.output / "checkpoints", self.accelerator)
        assert saved is not None  # a run begins with one
        if state.rollbacks == ROLLBACKS_BEFORE_GIVING_UP:
            raise Diverged(
                f"training diverges: {state.rollbacks + 1} times since the checkpoint {saved.path}, which is "
                f"untouched, {BAD_STEPS_BEFORE_ROLLBACK} steps in a row were not finite; lower train.lr "
                f"({self.config.train.lr:g}), or look at the batches in {self.output / 'skipped.jsonl'}"
            )
        self.journal.rolled_back(state.step, saved.step)
        state.roll_back(states.saved_state(saved))
        self.committed = state.step
