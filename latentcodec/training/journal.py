"""What a run writes for people: metrics.jsonl, config.yaml, sample pictures, lists of what was left out.

Only the main process writes. metrics.jsonl has one JSON object a step (and one a validation, with "psnr"); after a
resume it goes on behind the step that the run was resumed from, as if it had never stopped. Keys with "second" or
"minute" in them tell the time; all others are the same in every repetition of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from latentcodec.files import printable, write_whole
from latentcodec.pixels import encode_image, image_grid, to_uint8
from latentcodec.quality.metrics import Evaluation
from latentcodec.training.config import Config
from latentcodec.training.data.crops import Reject
from latentcodec.training.losses.teacher import Drift
from latentcodec.training.trackers import alert, show_pictures


class Journal:
    """The records of one run, in its output folder."""

    def __init__(self, output: Path, accelerator: Accelerator, config: Config) -> None:
        self.output, self.accelerator, self.config = output, accelerator, config
        self.metrics, self.result = output / "metrics.jsonl", output / "result.json"
        self.rejects = output / "rejects.jsonl"
        self.last_psnr: float | None = None
        self.listed: set[str] = set()  # the lines of rejects.jsonl
        self.bar: tqdm[Any] | None = None

    def begin(self, step: int, draw: int, complete: bool) -> None:
        """Open the records at `step` and `draw`: forget what was written after the checkpoint that is resumed from.

        Of a `complete` run, whose end will be done again, also forget what that end wrote.
        """
        if not self.accelerator.is_main_process:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        for unfinished in (*self.output.glob(".*.tmp"), *(self.output / "samples").glob(".*.tmp")):
            unfinished.unlink()  # what a kill left half written
        settings = yaml.safe_dump(_plain(asdict(self.config)), sort_keys=False)
        _write(self.output / "config.yaml", settings.encode())
        self._keep(self.metrics, lambda line: line["step"] < step + ("total" in line or not complete))
        self._keep(self.output / "skipped.jsonl", lambda line: line["draw"] < draw)
        self.result.unlink(missing_ok=True)  # of an earlier end, if the run was given more steps
        self.listed = set(self.rejects.read_text("utf-8").splitlines()) if self.rejects.exists() else set()
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

    def log(self, step: int, progress: float, report: dict[str, float]) -> None:
        """One step: a line in metrics.jsonl, the trackers and the progress bar; `progress` in (0, 1] of the run."""
        if self.bar is None:
            return
        _append(self.metrics, _json({"step": step, **report}))
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
        _append(self.metrics, _json({"step": step, "minutes": seconds / 60, **scores, **latents}))
        logged = {f"validation/{name}": value for name, value in scores.items()} | latents
        self.accelerator.log(logged, step=step)
        self.say(
            f"step {step}: {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f} on {scores['images']} images"
        )

    def drifted(self, step: int, drift: Drift) -> None:
        """How far the latents are from the teacher's, over the training crops."""
        _append(self.metrics, _json({"step": step, **drift.record()}))
        self.say(f"step {step}: latents {drift.rms:.4f} deviations from the teacher's")

    def samples(self, step: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """samples/step-N.png: a column an image; the original, the reconstruction, and four times their difference."""
        side = min(min(image.shape[-2:]) for image, _ in pairs)
        rows: list[list[Tensor]] = [[], [], []]
        for image, reconstruction in pairs:
            x, y = (t[:, :side, :side].float().cpu() for t in (image, reconstruction))
            for row, picture in zip(rows, (x, y, ((y - x) * 4).clamp(-1, 1)), strict=True):
                row.append(picture)
        grid = image_grid([picture for row in rows for picture in row], columns=len(pairs))
        if grid.shape[0] not in (1, 3, 4):
            return  # no picture has two channels, or five
        path = self.output / "samples" / f"step-{step:08d}.png"
        _write(path, encode_image(grid, path))
        show_pictures(self.accelerator.trackers, to_uint8(grid).permute(1, 2, 0).numpy(), step)

    def alert(self, step: int, text: str, failure: bool) -> None:
        """That the latents have entered a regime or left it: in the terminal, and as an alert of the trackers."""
        self.say(f"step {step}: {text}")
        alert(self.accelerator.trackers, text, failure, step)

    def rejected(self, rejects: list[Reject]) -> None:
        """rejects.jsonl: each image that could not be read, once, with the reason: {"path", "reason"}."""
        if not self.accelerator.is_main_process:
            return
        for path, reason in rejects:
            line = json.dumps({"path": printable(path), "reason": printable(reason)}, ensure_ascii=False)
            if line not in self.listed:
                self.listed.add(line)
                _append(self.rejects, line)
                self.say(f"left out ({len(self.listed)} so far, all in rejects.jsonl): {path}: {reason}")

    @property
    def has_rejects(self) -> bool:
        """Whether any image had to be left out, in this start of the run or an earlier one."""
        return self.rejects.exists()

    def skipped(self, step: int, draw: int, names: list[str]) -> None:
        """skipped.jsonl: a batch's positions in the stream, and the names of its numbers that were not finite."""
        if not self.accelerator.is_main_process:
            return
        positions = range(draw * self._batch, (draw + 1) * self._batch)
        names = [name for name in names if "/" not in name]  # a bad channel makes the whole bad
        line = {"step": step, "draw": draw, "not_finite": names, "positions": [*positions]}
        _append(self.output / "skipped.jsonl", json.dumps(line))
        self.say(f"step {step}: {names[0]} is not finite; nothing was changed, the batch is in skipped.jsonl")

    def rolled_back(self, step: int, to: int) -> None:
        """Forget the steps after the checkpoint whose weights are taken again, and say so."""
        if self.accelerator.is_main_process:
            self._keep(self.metrics, lambda line: line["step"] <= to)
            self.say(
                f"step {step}: three steps in a row were not finite; back to the checkpoint of step {to}"
            )

    def finish(self, step: int, seconds: float, evaluation: Evaluation | None) -> None:
        """result.json: the last file of a complete run, which says that there is nothing left to do."""
        if self.accelerator.is_main_process:
            scores = {} if evaluation is None else _scores(evaluation)
            line = _json({"step": step, "minutes": seconds / 60, **scores}) + "\n"
            _write(self.result, line.encode())

    def finished_step(self) -> int | None:
        """The step at which the run was finished; None if it was not, or its codec is gone."""
        finished = self.result.exists() and (self.output / "codec").exists()
        return json.loads(self.result.read_text())["step"] if finished else None

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
            f"- {step} steps of {self._batch} crops of "
            f"{data.resolution} x {data.resolution}, {seconds / 60:.0f} minutes, on: "
            + (data.path or "the built-in drawn pictures"),
            "- all settings: `config.yaml` beside the run's `metrics.jsonl`",
        ]
        if evaluation is not None:
            lines.append(
                f"- {len(evaluation.images)} held-out images: PSNR {evaluation.mean('psnr'):.2f} dB, SSIM "
                f"{evaluation.mean('ssim'):.4f} (posterior mode, whole images, 8 bits)"
            )
        return printable("\n".join(lines))

    def say(self, text: str) -> None:
        """A line of text, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(printable(text))

    def _keep(self, path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only the wanted lines of a file of JSON lines; it may not exist. A damaged end is dropped, and said."""
        if not path.exists():
            return
        whole = path.read_bytes().splitlines(keepends=True)
        whole = [line for line in whole if line.endswith(b"\n")]  # a kill can leave half a line
        records = [_record(line) for line in whole]
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
        _write(path, b"".join(kept))

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


def _json(record: dict[str, Any]) -> str:
    """One line; JSON has no infinity, which a perfect PSNR is."""
    return json.dumps(
        {k: None if v in (math.inf, -math.inf) else v for k, v in record.items()}, allow_nan=False
    )


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line of JSON says; None if it is damaged, as by zeros after a power cut."""
    try:
        record = json.loads(line.decode())
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _append(path: Path, line: str) -> None:
    content = f"{printable(line)}\n".encode()
    with _named_on_failure(path, content), path.open("ab") as file:
        file.write(content)


def _write(path: Path, content: bytes) -> None:
    with _named_on_failure(path, content):
        write_whole(path, content)


@contextmanager
def _named_on_failure(path: Path, content: bytes) -> Iterator[None]:
    """The system's error for a full disk names no file; ours does, and says how many bytes it needs."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} cannot be written, it needs {len(content):,} bytes: {error.strerror}. "
            "The checkpoints are untouched."
        ) from error
