"""The classic VAE experiments: trains sixteen small VAEs and leaves one page that teaches what they show.

    make experiments                                    # drawn digits, nothing from outside
    make experiments DATA=path/to/mnist                 # idx or npz files, a data set of the Hugging Face hub

What each experiment is for stands in README.md; what each run is, in configs/. One process for each core, one thread in
each. Stopped and started again it goes on where it was; what is trained already is only looked at again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes that are started

import torch
from torch import Tensor

from latentcodec.machine import physical_cores
from latentcodec.quality import basics, linear_theory
from latentcodec.quality.one_cell import RawCodec, importance_bounds, radial_power
from latentcodec.report.build import write_result
from latentcodec.report.classic import Shown, Views, look, look_at_sigma
from latentcodec.report.inspection import training_curves
from latentcodec.report.pages.classic_claims import claims
from latentcodec.report.pictures import tiles, webp
from latentcodec.report.results import provenance, require_folder
from latentcodec.training import loop
from latentcodec.training.config import Config, parse
from latentcodec.training.data.crops import pad_edges
from latentcodec.training.data.images import TrainingImages, open_images
from latentcodec.training.signals import StopRequest
from latentcodec.training.trainer import Trainer

CONFIGS = Path(__file__).parent / "configs"
SIDE = 32
TWO = Views(scatter=True, draws=True, map=True, strips=6, bubbles=True, walks=2, reconstructions=True)
SIXTEEN = Views(draws=True, strips=6, bubbles=True, walks=6, reconstructions=True)
FEW, DRAWN = Views(reconstructions=True), Views(draws=True, reconstructions=True)
RUNS = {  # the longest first, so that no core is left alone at the end
    "vae-128": DRAWN,
    "pixel-scale": FEW,
    "vae-2": TWO,
    "ae-2": TWO,
    "collapsed-2": TWO,
    "vae-16": SIXTEEN,
    "ae-16": SIXTEEN,
    **dict.fromkeys(("collapsed-16", "bernoulli", "laplace"), DRAWN),
    **dict.fromkeys(("few-ae", "few-vae", "beta-0.01", "beta-0.1", "beta-4", "beta-10"), FEW),
}
FOLLOWED = ("vae-2", "ae-2", "collapsed-2")  # whose codes are drawn as they move
FOLLOWED_AT = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
FOLLOWED_CODES = 200
LOOKED_AT = 400  # images that are not trained on
TRAIN_IMAGES = 1000  # that drawn pictures are compared with
THEORY_IMAGES = 2000
SECONDS_BETWEEN = 10.0  # two lines of progress of one run
BOUND_IMAGES, BOUND_DRAWS = 32, (1, 10, 100)


def main(arguments: list[str] | None = None) -> int:
    """Train what is missing, look at everything, write the page; returns the exit code."""
    options = _options(arguments)
    began = time.perf_counter()
    try:
        require_folder(options.out)
        settings = _data_settings(options)
        configs = {name: _config(name, options, settings) for name in RUNS}
        images = open_images(configs["vae-16"].data, 1, 0)
        data = _begin(images, configs, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    data["runs"] = _train_all(configs, options)
    data["seconds"] = time.perf_counter() - began
    data["core_minutes"] = sum(run["cpu_seconds"] for run in data["runs"].values()) / 60
    files = write_result(data, options.out, "classic_vae")
    for claim in claims(data):
        print(f"{'held' if claim.held else 'DID NOT HOLD':>12}  {claim.text}: {claim.measured}")
    print(f"{data['core_minutes']:.1f} core-minutes of training and looking; the page: {files['html']}")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data", help="idx or npz files, or a data set of grey images; default: drawn digits"
    )
    parser.add_argument("--label-column", help="the data set's column of labels, such as label")
    parser.add_argument("--out", type=Path, default=Path("runs/classic_vae"), help="folder of runs and page")
    parser.add_argument("--steps", type=int, help="of every run, in place of the configurations' numbers")
    parser.add_argument(
        "--processes", type=int, default=physical_cores(), help="runs at a time; one core each"
    )
    return parser.parse_args(arguments)


def _data_settings(options: argparse.Namespace) -> list[str]:
    """What --data changes in every configuration."""
    if options.data is None:
        return []
    found = ["--data.path", options.data]
    found += ["--data.label_column", options.label_column] if options.label_column else []
    config = parse(["--config", str(CONFIGS / "base.yaml"), "--output_dir", "unused", *found])
    height, width = open_images(config.data, 1, 0).val_source.size(0)
    if height != width or height > SIDE or (SIDE - height) % 2:
        raise ValueError(f"--data {options.data}: images of {height} x {width}; these experiments take squares "
                         f"of at most {SIDE} pixels a side, an even number")  # fmt: skip
    return [*found, "--data.padding", str((SIDE - height) // 2)]


def _config(name: str, options: argparse.Namespace, settings: list[str]) -> Config:
    files = ["--config", str(CONFIGS / "base.yaml"), "--config", str(CONFIGS / f"{name}.yaml")]
    steps = ["--train.max_steps", str(options.steps)] if options.steps else []
    return parse([*files, "--output_dir", str(options.out / name), *settings, *steps])


# ---- before any training


def _begin(images: TrainingImages, configs: dict[str, Config], options: argparse.Namespace) -> dict[str, Any]:
    """What is known without training: the data, the arithmetic of E0, and the predictions, which are printed."""
    training = _some(images, images.train.tolist()[:THEORY_IMAGES])
    variances = linear_theory.eigenvalues(training)
    shown = _shown(images)
    leading = ", ".join(f"{value:.1f}" for value in variances[:8])
    print(f"variances of {len(training)} images along their principal directions: {leading} ...")
    print(
        f"{'run':>13} {'v':>7} {'alive':>6} {'KL, nats':>9}   predicted by the linear VAE, before any training"
    )
    predictions = {}
    for name, config in configs.items():
        if config.loss.likelihood != "gaussian" or config.loss.has_pixel_scale:
            continue
        assert not isinstance(config.loss.scale, str)
        latents = config.model.latent_channels
        found = linear_theory.predict(variances, latents, config.loss.kl_weight, config.loss.scale)
        predictions[name] = vars(found)
        print(f"{name:>13} {found.noise:7g} {found.alive:3d}/{latents:<3d} {found.kl:9.1f}", flush=True)
    labels = images.val_source.labels
    return {
        "bench": "classic_vae",
        **provenance(torch.device("cpu")),
        "set": options.data or "drawn digits",
        "images": images.counts,
        "looked_at": len(shown.x),
        "label_names": [] if labels is None else labels.names,
        "basics": basics.measure_all(),
        "theory": {
            "variances": variances[:200].tolist(),
            "total": variances.sum().item(),
            "runs": predictions,
        },
        "data_picture": webp(tiles(shown.x[:64], 8)),
        "data_power": radial_power(shown.x).tolist(),
        "variance": shown.x.var(0, unbiased=False).sum().item(),
    }


def _shown(images: TrainingImages) -> Shown:
    """Images that are not trained on, held out or left over, with their labels; and some that are trained on."""
    rest = set(range(len(images.val_source))) - {*images.train.tolist()}
    indices = sorted(rest)[:LOOKED_AT]
    labels = images.val_source.labels
    numbers = None if labels is None else torch.from_numpy(labels.numbers[indices])
    return Shown(_some(images, indices), numbers, _some(images, images.train.tolist()[:TRAIN_IMAGES]))


def _some(images: TrainingImages, indices: list[int]) -> Tensor:
    padding = images.config.padding
    return torch.stack([pad_edges(images.val_source.read(index), padding) for index in indices])


# ---- training


def _train_all(configs: dict[str, Config], options: argparse.Namespace) -> dict[str, Any]:
    """All runs, one process a core, or in this one if it is to be one; a line for each that is over."""
    began, results = time.perf_counter(), dict[str, Any]()
    for name, found in _results(configs, min(options.processes, len(configs))):
        results[name] = found
        minutes = (time.perf_counter() - began) / 60
        rest = minutes / len(results) * (len(configs) - len(results))
        looked = found["looked"]
        print(
            f"[{len(results)}/{len(configs)}] {name}: {found['steps']} of {found['planned_steps']} steps, "
            f"{looked['psnr_db']:.2f} dB, KL {looked['kl_nats']:.2f} nats; "
            f"{minutes:.1f} min so far, about {rest:.0f} to go",
            flush=True,
        )
    return {name: results[name] for name in configs}


def _results(configs: dict[str, Config], processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each run gives, as they end."""
    if processes == 1:
        yield from ((name, run(name, config)) for name, config in configs.items())
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(run, name, config): name for name, config in configs.items()}
        for future in as_completed(pending):
            yield pending[future], future.result()


def run(name: str, config: Config) -> dict[str, Any]:
    """Train one VAE, or go on with it, and look at it. What the trainer says goes to log.txt in its folder."""
    torch.set_num_threads(1)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    terminal = sys.stdout
    with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        trainer = Trainer(config)
        trainer.resume()
        shown = _shown(trainer.images)
        if not trainer.finished:
            above = multiprocessing.parent_process()  # saves a checkpoint and ends when nobody waits for it
            stop = StopRequest(None if above is None else above.pid)
            loop.train(trainer, stop, _Follow(name, trainer, shown, terminal))
            if trainer.stopped_by:
                raise KeyboardInterrupt
        codec = RawCodec(trainer.state.ema, (SIDE, SIDE))
        found: dict[str, Any] = {
            "numbers": config.model.latent_channels,
            "kl_weight": config.loss.kl_weight,
            "likelihood": config.loss.likelihood,
            "scale": config.loss.scale,
            "steps": trainer.state.step,
            "planned_steps": config.train.max_steps,
            "looked": look(codec, shown, RUNS[name]),
            "curves": (training_curves(folder) or {}).get("curves"),
        }
        if (folder / "codes.jsonl").exists():
            lines = (folder / "codes.jsonl").read_text().splitlines()
            found["followed"] = [json.loads(line) for line in lines]
        if trainer.state.codec.pixel_scale is not None:
            found["sigma"] = _sigma(trainer, shown.x)
        if name == "vae-2":
            found["bounds"] = importance_bounds(codec, shown.x[:BOUND_IMAGES], BOUND_DRAWS, 1.0)
        trainer.accelerator.end_training()
    spent = folder / "cpu_seconds"  # of all starts of this run
    before = float(spent.read_text()) if spent.exists() else 0.0
    found["cpu_seconds"] = before + time.process_time() - began
    spent.write_text(str(found["cpu_seconds"]))
    return found


class _Follow:
    """Looks after each step: a line of progress now and then, and for some runs where the codes are."""

    def __init__(self, name: str, trainer: Trainer, shown: Shown, terminal: Any) -> None:
        self.name, self.shown, self.terminal = name, shown, terminal
        self.said = time.perf_counter()
        self.file = Path(trainer.config.output_dir) / "codes.jsonl" if name in FOLLOWED else None
        if self.file is not None and trainer.state.step == 0:
            self.file.unlink(missing_ok=True)
            self._note(trainer)

    def __call__(self, trainer: Trainer) -> None:
        step = trainer.state.step
        if self.file is not None and step in FOLLOWED_AT:
            self._note(trainer)
        if time.perf_counter() - self.said > SECONDS_BETWEEN:
            self.said = time.perf_counter()
            print(f"    {self.name}: step {step}, {trainer.progress:.0%}", file=self.terminal, flush=True)

    def _note(self, trainer: Trainer) -> None:
        codec = RawCodec(trainer.state.ema, (SIDE, SIDE))
        mean, std = codec.posterior(self.shown.x[:FOLLOWED_CODES])
        line = {"step": trainer.state.step, "codes": [[round(v, 3) for v in row] for row in mean.tolist()],
                "mean_abs_mu": mean.abs().mean().item(), "mean_sigma": std.mean().item()}  # fmt: skip
        assert self.file is not None
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


@torch.no_grad()
def _sigma(trainer: Trainer, x: Tensor) -> dict[str, Any]:
    """Of a run with a sigma for each pixel; the second head belongs to the trained weights, not to their average."""
    codec = trainer.state.codec
    mean, _ = RawCodec(codec.vae, (SIDE, SIDE)).posterior(x)
    y, log_scale = codec.decode(mean[:, :, None, None].to(codec.vae.device))
    return look_at_sigma(x, y.to(x.device), log_scale.exp().to(x.device))


if __name__ == "__main__":
    sys.exit(main())
