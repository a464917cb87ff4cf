"""What a run writes for people: metrics.jsonl, config.yaml, sample pictures, lists of what was left out.

Only the main process writes. metrics.jsonl has one JSON object a step (and one a validation, with "psnr"); after a
resume it goes on behind the step that the run was resumed from, as if it had never stopped. Keys with "second" or
"minute" in them tell the time; all others are the same in every repetition of the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from latentcodec.leftovers import is_leftover
from latentcodec.pixels import LeftOut, encode_image, labelled_grid, to_uint8
from latentcodec.pixels.folders import counted as by_reason
from latentcodec.printable import printable
from latentcodec.quality.metrics import Evaluation
from latentcodec.training.config import Config
from latentcodec.training.data.crops import Reject
from latentcodec.training.losses.teacher import Drift
from latentcodec.training.records import append, json_line, record_of, write
from latentcodec.training.trackers import alert, show_pictures

SAMPLE_ROWS = ("original", "reconstruction", "4 x difference")
NOTES_SAID = 10  # lines on images that were used though broken; the others are counted


class Journal:
    """The records of one run, in its output folder."""

    def __init__(self, output: Path, accelerator: Accelerator, config: Config) -> None:
        self.output, self.accelerator, self.config = output, accelerator, config
        self.metrics, self.result = output / "metrics.jsonl", output / "result.json"
        self.rejects = output / "rejects.jsonl"
        self.last_psnr: float | None = None
        self.listed: set[str] = set()  # the lines of rejects.jsonl
        self.notes: set[str] = set()  # on images that were used
        self.bar: tqdm[Any] | None = None

    def begin(self, step: int, draw: int, complete: bool, before: Mapping[str, Any] | None = None) -> None:
        """Open the records at `step` and `draw`: forget what was written after the checkpoint that is resumed from.

        Of a `complete` run, whose end comes again, forget that too. `before`: the configuration in that checkpoint.
        """
        if not self.accelerator.is_main_process:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        for unfinished in (*self.output.glob(".*.tmp"), *(self.output / "samples").glob(".*.tmp")):
            if is_leftover(unfinished):
                unfinished.unlink()
        write(self.output / "config.yaml", _as_yaml(_plain(asdict(self.config))))
        self._keep_config(step, before)
        self._keep(self.metrics, "step", lambda line: line["step"] < step + ("total" in line or not complete))
        drawn = draw * self._batch
        self._keep(self.output / "skipped.jsonl", "draw", lambda line: line["positions"][0] < drawn)
        self.result.unlink(missing_ok=True)  # of an earlier end, if the run was given more steps
        self.listed = (
            set(self.rejects.read_text("utf-8", "replace").splitlines()) if self.rejects.exists() else set()
        )
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
            self.say(f"resumed {self.output} at step {step}")

    def _keep_config(self, step: int, before: Mapping[str, Any] | None) -> None:
        """Keep the configuration of before, if it was another one, as config.until-step-N.yaml.

        Not that in config.yaml: a start that ended before a checkpoint has left its own there.
        """
        if step and before and before != _plain(asdict(self.config)):
            kept = self.output / f"config.until-step-{step:08d}.yaml"
            write(kept, _as_yaml(before))
            self.say(f"settings have changed; those of before are kept in {kept}")

    def log(self, step: int, progress: float, report: dict[str, float]) -> None:
        """One step: a line in metrics.jsonl, the trackers and the progress bar; `progress` in (0, 1] of the run."""
        if self.bar is None:
            return
        append(self.metrics, json_line({"step": step, **report}))
        self.accelerator.log(report, step=step)
        shown = {
            "loss": f"{report['total']:.4g}",
            "kl": f"{report['kl']:.4g}",
            "img/s": f"{report['images_per_second']:.1f}",
            "waiting": f"{report['waited_seconds'] / report['step_seconds']:.0%}",
        }
        if self.last_psnr is not None:
            shown["val dB"] = f"{self.last_psnr:.2f}"
        self.bar.total = round(
            step / progress
        )  # where the clock ends the run, as many steps as it will allow
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def validated(
        self, step: int, seconds: float, evaluation: Evaluation, latents: dict[str, float] | None = None
    ) -> None:
        """The scores of the held-out images, and the measures of their latents."""
        scores, latents = _scores(evaluation), latents or {}
        self.last_psnr = scores["psnr"]
        append(self.metrics, json_line({"step": step, "minutes": seconds / 60, **scores, **latents}))
        logged = {f"validation/{name}": value for name, value in scores.items()} | latents
        self.accelerator.log(logged, step=step)
        self.say(
            f"step {step}: {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f} on {scores['images']} images"
        )

    def drifted(self, step: int, drift: Drift) -> None:
        """How far the latents are from the teacher's, over the training crops."""
        append(self.metrics, json_line({"step": step, **drift.record()}))
        self.say(f"step {step}: latents {drift.rms:.4f} deviations from the teacher's")

    def samples(self, step: int, pairs: list[tuple[Tensor, Tensor]], names: Sequence[str] = ()) -> None:
        """samples/step-N.png: a column an image; the original, the reconstruction, and four times their difference.

        `names`: what stands above each column.
        """
        side = min(min(image.shape[-2:]) for image, _ in pairs)
        rows: list[list[Tensor]] = [[], [], []]
        for image, reconstruction in pairs:
            x, y = (t[:, :side, :side].float().cpu() for t in (image, reconstruction))
            for row, picture in zip(rows, (x, y, ((y - x) * 4).clamp(-1, 1)), strict=True):
                row.append(picture)
        if rows[0][0].shape[0] not in (1, 3, 4):
            return  # no picture has two channels, or five
        grid = labelled_grid(list(zip(SAMPLE_ROWS, rows, strict=True)), names)
        path = self.output / "samples" / f"step-{step:08d}.png"
        write(path, encode_image(grid, path))
        show_pictures(self.accelerator.trackers, to_uint8(grid).permute(1, 2, 0).numpy(), step)

    def alert(self, step: int, text: str, failure: bool) -> None:
        """That the latents have entered a regime or left it: in the terminal, and as an alert of the trackers."""
        self.say(f"step {step}: {text}")
        alert(self.accelerator.trackers, text, failure, step)

    def say_left_out(self, left_out: Sequence[LeftOut]) -> None:
        """How many files look like images of the set and are not read, by reason: said before anything long begins."""
        if left_out:
            self.say(f"left out: {by_reason(list(left_out))}; each is listed in rejects.jsonl")

    def noted(self, notes: list[str]) -> None:
        """Count the images that were used though something beside their pixels is broken; the first of each is said."""
        for line in notes:
            if line not in self.notes:
                self.notes.add(line)
                if len(self.notes) <= NOTES_SAID:
                    self.say(f"used, though broken: {line}")

    def rejected(self, rejects: Sequence[Reject | LeftOut], quietly: bool = False) -> None:
        """rejects.jsonl: each image that was left out, once: {"path", "reason"}; it is said too, if not `quietly`."""
        if not self.accelerator.is_main_process:
            return
        for path, reason in rejects:
            line = json.dumps({"path": printable(path), "reason": printable(reason)}, ensure_ascii=False)
            if line not in self.listed:
                self.listed.add(line)
                append(self.rejects, line)
                if not quietly:
                    self.say(f"left out ({len(self.listed)} so far, all in rejects.jsonl): {path}: {reason}")

    @property
    def has_rejects(self) -> bool:
        """Whether any image had to be left out, in this start of the run or an earlier one."""
        return self.rejects.exists()

    def too_small(self, names: list[str], pixels: int) -> None:
        """Say which held-out images no score can be computed on: those below `pixels` a side."""
        if names:
            some = f"{len(names)} images, such as {names[0]}"
            self.say(f"not validated on, since a score needs {pixels} pixels a side: {some}")

    def skipped(self, step: int, draw: int, names: list[str]) -> None:
        """skipped.jsonl: a batch's positions in the stream, and the names of its numbers that were not finite."""
        if not self.accelerator.is_main_process:
            return
        positions = range(draw * self._batch, (draw + 1) * self._batch)
        names = [name for name in names if "/" not in name]  # a bad channel makes the whole bad
        line = {"step": step, "draw": draw, "not_finite": names, "positions": [*positions]}
        append(self.output / "skipped.jsonl", json.dumps(line))
        self.say(f"step {step}: {names[0]} is not finite; nothing was changed, the batch is in skipped.jsonl")

    def rolled_back(self, step: int, to: int) -> None:
        """Forget the steps after the checkpoint whose weights are taken again, and say so."""
        if self.accelerator.is_main_process:
            self._keep(self.metrics, "step", lambda line: line["step"] <= to)
            self.say(
                f"step {step}: three steps in a row were not finite; back to the checkpoint of step {to}"
            )

    def finish(self, step: int, seconds: float, evaluation: Evaluation | None) -> None:
        """result.json: the last file of a complete run, which says that there is nothing left to do."""
        if self.accelerator.is_main_process:
            scores = {} if evaluation is None else _scores(evaluation)
            line = json_line({"step": step, "minutes": seconds / 60, **scores}) + "\n"
            write(self.result, line.encode())

    def finished_step(self) -> int | None:
        """The step at which the run was finished; None if it was not, or its codec is gone."""
        finished = self.result.exists() and (self.output / "codec").exists()
        record = record_of(self.result.read_bytes()) if finished else None
        step = None if record is None else record.get("step")
        return step if isinstance(step, int) else None  # a damaged one is as none: the end is done again

    def say_what_was_broken(self) -> None:
        """At the end: what was left out, by reason, and how many images were used though something is broken."""
        if self.listed:
            rejects = [record for line in self.listed if (record := record_of(line.encode()))]
            items = [LeftOut(str(line.get("path")), str(line.get("reason"))) for line in rejects]
            self.say(f"left out: {by_reason(items)}; each is listed in {self.rejects}")
        if self.notes:
            self.say(f"used, though something beside the pixels is broken: {len(self.notes)} images")

    def close(self) -> None:
        """End the progress bar, so that what is said next has a line of its own."""
        if self.bar is not None:
            self.bar.close()

    def card(self, step: int, seconds: float, evaluation: Evaluation | None) -> str:
        """The model card's account of the training: Markdown."""
        data = self.config.data
        lines = [
            "## Training",
            "",
            f"- {step} steps of {self._batch} crops of {data.resolution} x {data.resolution}, "
            f"{seconds / 60:.0f} minutes, on: {data.path or f'the built-in drawn {data.drawn}'}",
            "- all settings: `config.yaml` beside the run's `metrics.jsonl`",
        ]
        if evaluation is not None:
            lines.append(
                f"- {len(evaluation.images)} held-out images: PSNR {evaluation.mean('psnr'):.2f} dB, SSIM "
                f"{evaluation.mean('ssim'):.4f} (posterior mode, the middle of each, at most "
                f"{data.val_resolution} x {data.val_resolution} pixels, 8 bits)"
            )
        return printable("\n".join(lines))

    def say(self, text: str) -> None:
        """A line of text, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(printable(text))

    def _keep(self, path: Path, key: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only the wanted lines of a file of JSON lines; it may not exist. A damaged end is dropped, and said.

        A line without a whole number under `key` is damaged.
        """
        if not path.exists():
            return
        whole = path.read_bytes().splitlines(keepends=True)
        whole = [line for line in whole if line.endswith(b"\n")]  # a kill can leave half a line
        records = [record_of(line, key) for line in whole]
        damaged = records.index(None) if None in records else len(records)
        if any(record is not None and wanted(record) for record in records[damaged:]):
            raise ValueError(
                f"{path}, line {damaged + 1} is damaged, and good lines follow it; remove that line to resume the run"
            )
        if damaged < len(records):
            self.say(f"{path}: the end is damaged and was dropped, from line {damaged + 1} on")
        kept = [
            line for line, record in zip(whole, records, strict=True) if record is not None and wanted(record)
        ]
        write(path, b"".join(kept))

    @property
    def _batch(self) -> int:
        """Images of an optimizer step, of all processes."""
        return self.config.train.batch_size * self.config.train.accumulation * self.accelerator.num_processes


def _scores(evaluation: Evaluation) -> dict[str, float]:
    return {
        "psnr": evaluation.mean("psnr"),
        "ssim": evaluation.mean("ssim"),
        "images": len(evaluation.images),
    }


def _as_yaml(settings: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(settings, sort_keys=False).encode()


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value
