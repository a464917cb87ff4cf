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

from latentcodec.quality.metrics import SSIM_WINDOW
from latentcodec.training import preflight
from latentcodec.training import state as states
from latentcodec.training.checkpoint import Checkpoint, prune
from latentcodec.training.config import Config
from latentcodec.training.data.crops import Batch
from latentcodec.training.data.images import held_out, open_images
from latentcodec.training.data.stream import first_crops, training_batches
from latentcodec.training.exchange import Exchange, wait_for_others
from latentcodec.training.export.exporter import Exporter
from latentcodec.training.gradients import Gradients
from latentcodec.training.hardware import settled, take_hardware
from latentcodec.training.journal import Journal
from latentcodec.training.losses.adversary import Adversary
from latentcodec.training.losses.objective import Objective
from latentcodec.training.same_inputs import fingerprints, require_same_codecs, require_same_images
from latentcodec.training.signals import StopRequest
from latentcodec.training.start import model as begin
from latentcodec.training.watchdog import doing
from latentcodec.vae.families import family_of

BAD_STEPS_BEFORE_ROLLBACK = 3
ROLLBACKS_BEFORE_GIVING_UP = 3


class Diverged(RuntimeError):
    """Training does not recover from numbers that are not finite; the message says what to change."""


class Trainer:
    """One run: built from its configuration, resumed from its checkpoints, stepped, validated, saved."""

    def __init__(self, config: Config) -> None:
        self.output = Path(config.output_dir)
        processes, passed_over = preflight.new_processes(config)
        self.found = preflight.find_checkpoint(config, processes)
        self.hardware = take_hardware(config, self.found, processes)
        self.config = config = settled(config, self.hardware)
        self.accelerator = accelerator = preflight.new_accelerator(config, self.hardware.precision)
        self.journal = Journal(self.output, accelerator, config)
        for note in (*passed_over, *config.notes, *self.hardware.notes):
            self.journal.say(note)
        doing("loading models and opening the images", timed=not preflight.fetches(config))
        parent = begin.load_parent(config.model)
        for note in preflight.require_normalisable(config, parent):
            self.journal.say(note)
        kept = {}  # the parent's weights, before it is trained in place
        if parent is not None and config.finish.parent_share:
            kept = {name: value.clone() for name, value in parent.state_dict().items()}
        teacher = begin.load_teacher(config.model, accelerator.device, self.hardware.precision == "bf16")
        self.codecs = fingerprints(parent, teacher)
        channels = begin.image_channels(config.model, parent)
        f, whole = begin.downsampling_factors(config.model, parent, teacher)
        smallest = preflight.smallest_crop(config, whole)
        torch.manual_seed(config.train.seed)  # the weights that no closed form sets
        adversary = Adversary.of(config.discriminator, channels, smallest, accelerator)
        self.images = open_images(config.data, channels, config.train.seed)
        doing("preparing the start")
        self.journal.say_left_out(self.images.left_out)
        self.held_out = held_out(self.images, SSIM_WINDOW)
        self.journal.too_small(self.held_out.too_small, SSIM_WINDOW)
        # A start from the data would only be overwritten by what was found.
        start = config.model if self.found is None else replace(config.model, init="default")
        vae = begin.new_vae(start, parent, teacher, partial(first_crops, self.images, f))
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        c, seed = family_of(vae).raw_channels(vae.config), config.train.seed
        doing("preparing the losses", timed=not config.loss.fetches_lpips)
        self.objective = Objective(config.loss, config.regularizer, seed, c, f, whole, accelerator.device)
        doing("preparing the first step")
        self.state = states.new_state(config, vae, self.objective.rate, adversary, accelerator, layout)
        self.gradients = Gradients(config.train, self.state, self.objective, teacher, accelerator, layout)
        self.exporter = Exporter(
            config, self.state, teacher, kept, self.images, self.held_out, self.journal, accelerator, layout
        )
        self.committed = -1  # the step of the newest checkpoint
        self.stopped_by = 0  # the signal that ended this start of the run

    # ---- what the loop asks for ------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the newest checkpoint that verifies; a new run commits one of its start."""
        state = self.state
        before = {} if self.found is None else self.found.state.get("config", {})
        if self.found is None:
            self.checkpoint()
        else:
            self.found.require_same({"ema": state.ema.state_dict()}, {})
            require_same_codecs(self.found, self.codecs)
            require_same_images(self.found, self.images)
            for line in preflight.changed_settings(before, self.config, self.found.step):
                self.journal.say(line)
            state.load_state_dict(states.saved_state(self.found))
            state.draw = self._whole_batches(state.draw, self.found)
            self.committed = state.step
            if self.accelerator.is_main_process:
                prune(self.found.path.parent, self.found.path, self.config.train.keep_last)
        if not self.finished:
            self.gradients.compile()
            self.journal.begin(state.step, state.draw, self.progress >= 1, before)
            self.journal.rejected(self.held_out.rejects)
            self.journal.rejected(self.images.left_out, quietly=True)  # they have been counted by reason

    def _whole_batches(self, draw: int, found: Checkpoint) -> int:
        """How many global batches of today hold the images of the `draw` batches before `found`, which had its size.

        Where they are not a whole number, the rest of the last one is passed over: no image is met with the crop and
        the noise that it had before.
        """
        now = self.hardware.global_batch
        before = int(found.state.get("global_batch", now))  # older checkpoints do not say it
        return -(-draw * before // now)

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
        doing("saving a checkpoint")
        if self.accelerator.is_main_process:
            settings = preflight.fixed_settings(config)
            settings |= {
                "config": asdict(config),
                "images": self.images.counts,
                "image_digest": self.images.digest,
                "codecs": self.codecs,
            }
            settings["machine"] = self.hardware.record()
            settings["processes"] = self.hardware.processes
            settings["global_batch"] = self.hardware.global_batch
            states.save(state, self.output / "checkpoints", settings, config.train.keep_last)
        self.committed, state.rollbacks = state.step, 0
        wait_for_others(self.accelerator)

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
        notes = [note for batch in micro_batches for note in batch.get("notes", [])]
        gathered = self.exchange.gather(sums, bool(rejects or notes))
        state.seconds += gathered.seconds
        self.stopped_by = gathered.stopped_by
        if gathered.rejected:
            self.journal.rejected(gather_object(rejects))
            self.journal.noted(gather_object(notes))
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
        timing = self.exchange.timing(self.hardware.global_batch, gathered) | {"minutes": state.seconds / 60}
        return None if bad else report | timing

    def _move_weights(self, report: dict[str, float], adversary: Adversary | None) -> dict[str, float]:
        """Everything that a step of finite numbers changes; returns what to report of it."""
        changes = {"lr": self.state.move_weights(self.config.train, self.progress)}
        if adversary is not None:
            changes |= adversary.step(report)
        changes |= self.objective.after_step(self.state.step, report)
        self.state.step += 1
        self.state.bad_steps = 0
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
        saved = preflight.newest_checkpoint(self.output / "checkpoints", self.accelerator)
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
