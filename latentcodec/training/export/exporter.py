"""What a run shows of itself between two steps and at its end: its score, sample pictures, and the folder codec/.

All of it is of the averaged weights. What the numbers mean is in `latents.py`, `teacher.py` and `quality/metrics.py`.

Shapes: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.latents import LatentStatistics, latent_statistics
from latentcodec.quality.metrics import Evaluation, evaluate, reconstruct
from latentcodec.training.config import Config
from latentcodec.training.data.images import HeldOut, TrainingImages
from latentcodec.training.data.stream import first_crops, training_batches
from latentcodec.training.exchange import wait_for_others
from latentcodec.training.export.codec_folder import finish, write_codec
from latentcodec.training.export.regimes import Regimes
from latentcodec.training.journal import Journal
from latentcodec.training.losses.teacher import Teacher
from latentcodec.training.progress import counted
from latentcodec.training.state import TrainState
from latentcodec.training.watchdog import OTHERS, doing

SAMPLES = 6  # held-out images whose reconstruction is drawn at each validation


class Exporter:
    """Scores and saves the codec of one run."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        teacher: Teacher | None,
        parent: Mapping[str, Tensor],
        images: TrainingImages,
        held_out: HeldOut,
        journal: Journal,
        accelerator: Accelerator,
        layout: torch.memory_format,
    ) -> None:
        """`parent`: its weights, of which `finish.parent_share` goes into the codec; else none."""
        self.config, self.state, self.teacher, self.parent = config, state, teacher, parent
        self.images, self.held_out = images, held_out
        self.journal, self.accelerator, self.layout = journal, accelerator, layout
        self.regimes = Regimes()

    def validate(self) -> Evaluation | None:
        """Score the averaged weights on the held-out images and draw some of them; None without such images."""
        state, evaluation = self.state, None
        if self.accelerator.is_main_process and self.held_out.images:
            codec = LatentCodec(self._vae())
            images = [image.to(self.accelerator.device) for image in self.held_out.images]
            bar = counted(images, "validating", len(images), "image")
            evaluation = evaluate(codec, bar, names=self.held_out.names)
            latents, lines = self.regimes.look(codec, images)
            self.journal.validated(state.step, state.seconds, evaluation, latents)
            for text, failure in lines:
                self.journal.alert(state.step, text, failure)
            pairs = [(image, reconstruct(codec, image[None])[0]) for image in images[:SAMPLES]]
            held_out = self.held_out
            names = held_out.classes or [Path(name).name for name in held_out.names]
            self.journal.samples(state.step, pairs, names[:SAMPLES])
        wait_for_others(self.accelerator)
        return evaluation

    def finish(self) -> None:
        """The end of a complete run: its score, its codec with the half-precision certificate, result.json."""
        evaluation = self.validate()
        self.save_codec(evaluation, self.config.finish.certificate_images)
        self.journal.finish(self.state.step, self.state.seconds, evaluation)

    def save_codec(self, evaluation: Evaluation | None = None, certificate_images: int = 0) -> None:
        """Write codec/; the half-precision certificate is measured on so many training crops, for 0 not at all."""
        state, normalise, vae = self.state, self.config.normalise, self._vae()
        statistics = None if normalise is None else self.latent_statistics()
        drift = None
        if self.teacher is not None:
            drift = self.teacher.drift(vae, self._crops(drawn=True), self._total)
        if self.accelerator.is_main_process:
            vae = copy.deepcopy(vae)
            crops = first_crops(self.images)[:certificate_images] if certificate_images else []
            sections = [self.journal.card(state.step, state.seconds, evaluation)]
            sections.append(finish(vae, normalise, statistics, crops))
            if drift is not None:
                self.journal.drifted(state.step, drift)
                sections.append(drift.card(str(self.config.model.teacher)))
            codec = LatentCodec(vae)
            card = codec.model_card("\n\n".join(filter(None, sections)))
            doing("saving the codec")
            write_codec(codec, Path(self.config.output_dir) / "codec", card)
        wait_for_others(self.accelerator)

    @torch.no_grad()
    def _vae(self) -> AutoencoderKL:
        """The averaged weights, with the parent's share in them."""
        if not self.parent:
            return self.state.ema
        vae = copy.deepcopy(self.state.ema)
        for name, value in vae.state_dict().items():
            if value.is_floating_point():
                value.lerp_(self.parent[name].to(value), self.config.finish.parent_share)
        return vae

    def latent_statistics(self) -> LatentStatistics:
        """Of the averaged weights' latents over crops with nothing drawn on them, since pages and lines have more
        contrast than what pipelines will encode; all processes measure what one would."""
        with self.accelerator.autocast():
            return latent_statistics(self._vae(), self._crops(drawn=False), self._total)

    def _crops(self, drawn: bool) -> Iterator[Tensor]:
        """[B, C, H, W]: this process's share of the `train.statistics_images` crops; `drawn`: as in training."""
        train, accelerator = self.config.train, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        steps = -(-train.statistics_images // (train.batch_size * world))
        batches = training_batches(
            self.images, train.batch_size, steps=steps, rank=rank, world_size=world, drawn=drawn
        )
        for batch in counted(batches, "measuring the latents", steps, "batch"):
            yield batch["pixels"].to(accelerator.device, memory_format=self.layout)

    def _total(self, sums: Tensor) -> Tensor:
        """Sums of one process -> sums over all of them."""
        doing(OTHERS)
        return self.accelerator.reduce(sums, reduction="sum")
