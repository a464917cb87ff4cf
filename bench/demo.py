"""The demo: train a small codec, try it in a pipeline, measure it, and show it beside a bundled one.

    python bench/demo.py --out runs/demo [--images FOLDER] [--minutes 2]

Without --images it works on drawn pictures. Each step says how long it and those after it will take, on two cores. What
the benches print is in FOLDER/*.log, their pages are in folders beside it, and the page that sums it up is
FOLDER/demo.html. The same command again goes on where it was: a training that is complete is not repeated.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from latentcodec.openmp import wait_briefly

if TYPE_CHECKING:  # the demo itself starts at once
    from latentcodec.report.page import Page

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "train" / "configs" / "demo.yaml"
BUNDLED = "photo-f8c16"
START_SECONDS, FINISH_SECONDS = 40, 15  # of a training, on two cores without bfloat16 units
REPORTS = ("reconstruction", "throughput")  # the benches that write a page
FINE = (0, 3)  # exit codes: done, and done with something to look at, such as images that could not be read
NOT_FETCHED = (
    "LPIPS is not measured: the weights of its network would have to be fetched (528 MB, bench/reconstruction.py "
    "does it where it is asked to)"
)


@dataclass(frozen=True)
class Step:
    """One command of the demo."""

    name: str
    title: str
    seconds: float
    """About how long it takes on two cores."""
    command: list[str]
    shown: bool = False
    """Whether its output is for the screen; else it goes to FOLDER/NAME.log."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the demo")
    add("--images", help="folder of images to train on and to show; default: drawn pictures")
    add("--minutes", type=float, default=2.0, help="of training (%(default)s)")
    add("--seconds", type=float, default=30.0, help="of measuring speed and memory (%(default)s)")
    add("--page", action="store_true", help="only write the page, from what is in the folder")
    return parser.parse_args(argv)


def steps(options: argparse.Namespace) -> list[Step]:
    out, minutes = options.out, options.minutes
    codec, pictures = out / "codec", out / "pipeline" / "originals"
    images = {} if options.images is None else {"images": options.images}
    settings = {"config": CONFIG, "output_dir": out, "train.max_minutes": minutes}
    if options.images is not None:
        settings["data.path"] = options.images
    score = {
        "codec": [codec, BUNDLED],
        "images": pictures,
        "lpips_net": "none",
        "rivals": [],
        "out": out / "reconstruction",
    }
    speed = {
        "codec": codec,
        "sizes": 256,
        "batches": 1,
        "seconds": options.seconds,
        "out": out / "throughput",
    }
    train = f"Train a codec of 1.0 M parameters for {minutes:g} minutes, beside start and finish"
    pipeline = {"codec": codec, "out": out / "pipeline", **images}
    page = {"page": [], "out": out, "minutes": minutes, **images}
    about = START_SECONDS + 60 * minutes + FINISH_SECONDS
    speed_title = "Measure its speed and memory in turn with diffusers' own class"
    return [
        Step("training", train, about, python(str(ROOT / "train" / "train.py"), **settings), shown=True),
        Step(
            "pipeline",
            "Send pictures through a diffusers pipeline with it",
            20,
            bench("pipeline", **pipeline),
        ),
        Step(
            "reconstruction", f"Score it beside the KLT and {BUNDLED}", 20, bench("reconstruction", **score)
        ),
        Step("throughput", speed_title, 15 + options.seconds, bench("throughput", **speed)),
        Step("page", "Put it on one page", 10, bench("demo", **page)),
    ]


def bench(name: str, **arguments: Any) -> list[str]:
    return python(str(ROOT / "bench" / f"{name}.py"), **arguments)


def python(*command: str, **arguments: Any) -> list[str]:
    """A command of this interpreter with its options; the value of one is a list where it has several or none."""
    line = [sys.executable, *command]
    for key, value in arguments.items():
        line += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return line


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if options.page:
        write_page(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    wait_briefly()  # for all steps
    todo = steps(options)
    print(f"The demo has {len(todo)} steps, about {clock(sum(step.seconds for step in todo))} on two cores.")
    print(f"Nothing is fetched from the network. {NOT_FETCHED}.")
    for index, step in enumerate(todo):
        later = sum(other.seconds for other in todo[index + 1 :])
        after = f", then {clock(later)} more" if later else ""
        print(f"\n[{index + 1}/{len(todo)}] {step.title}: about {clock(step.seconds)}{after}", flush=True)
        run(step, options.out)
    print_summary(options.out)


def clock(seconds: float) -> str:
    """90 -> 1:30 min, 20 -> 20 s."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02} min"


def run(step: Step, out: Path) -> None:
    """Run a step to its end, with a line that tells the time. Ends the demo where the step fails."""
    code: int | None
    if step.shown:
        code = subprocess.run(step.command, check=False).returncode
        where = ""
    else:
        log = out / f"{step.name}.log"
        with log.open("w") as file, tqdm(bar_format="      {elapsed}", leave=False) as line:
            child = subprocess.Popen(step.command, stdout=file, stderr=subprocess.STDOUT)
            try:
                while (code := _wait(child)) is None:
                    line.refresh()
            except BaseException:
                child.terminate()
                raise
        where = "" if code in FINE else f"\n{log.read_text()}"
    if code not in FINE:
        raise SystemExit(f"{where}\nerror: step {step.name} of the demo ended with code {code}")


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    """The exit code, or None after a moment: a second on a screen, longer in a log, where each line stays."""
    try:
        return child.wait(1 if sys.stderr.isatty() else 4)
    except subprocess.TimeoutExpired:
        return None


def last_line(out: Path, name: str) -> dict[str, Any]:
    """What a bench said in its last line."""
    result: dict[str, Any] = json.loads((out / f"{name}.log").read_text().splitlines()[-1])
    return result


def print_summary(out: Path) -> None:
    page = (out / "demo.html").resolve()
    print(f"\nThe trained codec         {out / 'codec'}")
    print(f"Its progress in pictures  {out / 'samples'}")
    for name in REPORTS:
        print(f"Report, {name:<17} {last_line(out, name)['files']['html']}")
    print(f"\nOpen this page in a browser: {page.as_uri()}")


# --- the page


STORY = """That is enough to see how training, pipeline and reports go together, and that the pictures get better. It is
not enough for a good codec: {bundled}, beside it, comes from the same code with three times the parameters, photographs
to learn from, and more time."""
READING = """PSNR is the ratio of signal to error in decibels: 6 dB more halve the error. The KLT is the best that a
linear map of single blocks of pixels does with as many numbers, so a codec above it has learned something. In the
pipeline a little noise was added to the latents, and an untrained denoiser left most of it there: that column shows
that the codec fits into diffusers, not how well anything draws."""
LEFT_BEHIND = {
    "codec/": "the trained codec, a plain diffusers AutoencoderKL",
    "samples/": "its progress: originals, reconstructions, four times the difference",
    "metrics.jsonl": "every loss of every step",
}


def write_page(options: argparse.Namespace) -> None:
    """FOLDER/demo.html: what was trained, pictures through both codecs, and what the numbers mean."""
    from latentcodec.report.page import Page
    from latentcodec.report.results import decibels, machine_facts

    result = json.loads((options.out / "result.json").read_text())
    scores = last_line(options.out, "reconstruction")
    machine, (trained, bundled) = scores["hardware"], scores["codecs"]
    minutes = f"{result['minutes']:.2g} minutes"
    page = Page(
        f"{minutes} of training",
        f"A codec of {trained['parameters'] / 1e6:.1f} M parameters, trained for {minutes} ({result['step']:,} steps) "
        f"on {options.images or 'drawn pictures'}, on {machine['cpu']} with {machine['threads']} threads. "
        + STORY.format(bundled=BUNDLED),
    )
    below = "on the pictures below"
    page.headline(
        [
            (
                f"{decibels(result['psnr'])} dB",
                f"PSNR on {result['images']} pictures held out from the training",
            ),
            (f"{decibels(trained['psnr']['mean'])} dB", below),
            (f"{decibels(trained['klt_psnr']['mean'])} dB", f"the KLT {below}, to which it was fitted"),
            (f"{decibels(bundled['psnr']['mean'])} dB", f"{BUNDLED} {below}"),
        ]
    )
    page.section("The pictures", READING)
    add_pictures(page, options.out, minutes)
    page.section("More", "What else the demo left in this folder, and the machine it ran on.")
    page.facts(LEFT_BEHIND | machine_facts(machine))
    reports = {f"report: {name}": last_line(options.out, name)["files"]["html"] for name in REPORTS}
    page.links({name: Path(html).relative_to(options.out).as_posix() for name, html in reports.items()})
    (options.out / "demo.html").write_text(page.render(), encoding="utf-8")
    print(json.dumps({"page": str(options.out / "demo.html")}))


def add_pictures(page: Page, out: Path, minutes: str) -> None:
    """A row for each: original, through the trained codec, through the pipeline, through the bundled codec."""
    from latentcodec.codec import LatentCodec
    from latentcodec.pixels import find_images, load_image
    from latentcodec.quality.metrics import psnr, reconstruct
    from latentcodec.report.results import decibels

    codecs = {
        minutes: LatentCodec.from_pretrained(out / "codec"),
        BUNDLED: LatentCodec.from_pretrained(BUNDLED),
    }
    for path in find_images(out / "pipeline" / "originals"):
        x = load_image(path)
        row = [(x[0], "original")]
        for name, codec in codecs.items():
            y = reconstruct(codec, x)
            row.append((y[0], f"{name}: {decibels(psnr(x, y).item())} dB"))
        row.insert(2, (load_image(out / "pipeline" / "results" / path.name)[0], "through the pipeline"))
        page.pictures(row, "")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
