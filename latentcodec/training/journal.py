"""What a run leaves behind for people: metrics.jsonl, config.yaml, sample grids, lists of what was left out.

Only the main process writes. metrics.jsonl has one JSON object a step (and one a validation, with "psnr"); after a
resume it goes on behind the step that the run was resumed from, as if it had never stopped.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from latentcodec.metrics import Evaluation
from latentcodec.pixels import image_grid, save_image, to_uint8

if TYPE_CHECKING:
    from latentcodec.training.config import Config
    from latentcodec.training.trainer import Trainer


class Journal:
    """The diary of one run in its output folder."""

    def __init__(self, output: Path, accelerator: Accelerator, config: Config) -> None:
        self.output, self.accelerator, self.config = output, accelerator, config
        self.metrics = output / "metrics.jsonl"
        self.last_psnr: float | None = None
        self.listed: set[str] = set()
        self.bar: tqdm[Any] | None = None

    def begin(self, step: int) -> None:
        """Open the diary at `step`: forget what was written after the checkpoint that the run resumes from."""
        if not self.accelerator.is_main_process:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        _write(self.output / "config.yaml", yaml.safe_dump(_plain(asdict(self.config)), sort_keys=False))
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill can leave half a line
        _write(self.metrics, "".join(line for line in whole if json.loads(line)["step"] <= step))
        rejected = self.output / "rejected.txt"
        self.listed = set(rejected.read_text().splitlines()) if rejected.exists() else set()
        if self.config.train.trackers:
            flat = {
                f"{s}.{k}": str(v)
                for s, d in asdict(self.config).items()
                if isinstance(d, dict)
                for k, v in d.items()
            }
            self.accelerator.init_trackers("latentcodec", config=flat)
        self.bar = tqdm(total=self.config.train.max_steps, initial=step, unit="step", dynamic_ncols=True)
        if step:
            self.bar.write(f"resumed {self.output} at step {step}")

    def log(self, step: int, report: dict[str, float], waited_seconds: float) -> None:
        """One step: a line in metrics.jsonl, the trackers and the progress bar."""
        if self.bar is None:
            return
        self._append({"step": step, **report, "waited_seconds": waited_seconds})
        self.accelerator.log(report, step=step)
        shown = {
            "loss": f"{report['total']:.4g}",
            "kl": f"{report['kl']:.4g}",
            "img/s": f"{report['images_per_second']:.1f}",
        }
        if self.last_psnr is not None:
            shown["val dB"] = f"{self.last_psnr:.2f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def validated(self, step: int, seconds: float, evaluation: Evaluation) -> None:
        """The scores of the held-out images."""
        scores = {"psnr": evaluation.mean("psnr"), "ssim": evaluation.mean("ssim")}
        self.last_psnr = scores["psnr"]
        self._append({"step": step, "minutes": seconds / 60, **scores, "images": len(evaluation.images)})
        self.accelerator.log({f"validation/{name}": value for name, value in scores.items()}, step=step)
        self._say(
            f"step {step}: {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f} on {len(evaluation.images)} images"
        )

    def samples(self, step: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """samples/step-N.png: a column an image; the original, the reconstruction, and four times their difference."""
        side = min(min(image.shape[-2:]) for image, _ in pairs)
        rows: list[list[Tensor]] = [[], [], []]
        for image, reconstruction in pairs:
            x, y = (t[:, :side, :side].float().cpu() for t in (image, reconstruction))
            for row, picture in zip(rows, (x, y, ((y - x) * 4).clamp(-1, 1)), strict=True):
                row.append(picture)
        grid = image_grid([picture for row in rows for picture in row], columns=len(pairs))
        if grid.shape[0] in (1, 3, 4):
            save_image(grid, self.output / "samples" / f"step-{step:08d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                tracker.log_images({"samples": to_uint8(grid).permute(1, 2, 0).numpy()[None]}, step=step)

    def rejected(self, lines: list[str]) -> None:
        """rejected.txt: each image that could not be read, once, with the reason."""
        for line in lines:
            if line not in self.listed:
                self.listed.add(line)
                with (self.output / "rejected.txt").open("a") as file:
                    file.write(line.replace("\n", " ") + "\n")
                self._say(f"left out ({len(self.listed)} so far, all in rejected.txt): {line}")

    def skipped(self, step: int, draw: int, positions: list[int]) -> None:
        """skipped.jsonl: a batch whose loss or gradient was not finite."""
        if self.accelerator.is_main_process:
            with (self.output / "skipped.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "draw": draw, "positions": positions}) + "\n")
        self._say(
            f"step {step}: a loss or gradient was not finite; nothing was changed, the batch is in skipped.jsonl"
        )

    def rolled_back(self, step: int, to: int) -> None:
        """Say that weights were taken from a checkpoint again."""
        self._say(f"step {step}: three steps in a row were not finite; back to the checkpoint of step {to}")

    def end(self) -> None:
        """Close the trackers and the bar."""
        if self.bar is not None:
            self.bar.close()
        self.accelerator.end_training()

    def card(self, trainer: Trainer, evaluation: Evaluation | None) -> str:
        """The model card's account of the training."""
        train, data = self.config.train, self.config.data
        crops = train.batch_size * train.accumulation * self.accelerator.num_processes
        lines = [
            "## Training",
            "",
            f"- {trainer.step} steps of {crops} crops of "
            f"{data.resolution} x {data.resolution}, {trainer.seconds / 60:.0f} minutes, on: "
            + (data.path or "the built-in drawn pictures"),
            "- all settings: `config.yaml` beside the run's `metrics.jsonl`",
        ]
        if evaluation is not None:
            lines.append(
                f"- {len(evaluation.images)} held-out images: PSNR {evaluation.mean('psnr'):.2f} dB, SSIM "
                f"{evaluation.mean('ssim'):.4f} (posterior mode, whole images, 8 bits)"
            )
        return "\n".join(lines)

    def _append(self, record: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _write(path: Path, text: str) -> None:
    """Replace a small file whole."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)
