"""Result files: what every measurement must say of itself, names that never overwrite, and what goes to the terminal.

A result is one JSON file. Its page can be made again from it at any time (`python -m latentcodec.report FILE`), so what
a page shows, pictures included, is in the file.
"""

import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from latentcodec.files import write_whole
from latentcodec.finite import finite
from latentcodec.machine import cpu_name, instruction_sets, physical_cores
from latentcodec.pixels import LeftOut
from latentcodec.printable import printable

LIMITS = (
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "LATENTCODEC_DTYPE",
)  # what the user took from the machine
PACKAGES = ("latentcodec", "torch", "diffusers", "accelerate", "numpy", "pillow")


def provenance(device: torch.device) -> dict[str, Any]:
    """What a result owes its reader: commit, versions, hardware, command and time."""
    return {
        "date": datetime.now().date().isoformat(),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {name: _version(name) for name in PACKAGES},
        "command": shlex.join([short_path(word) for word in sys.argv]),
        "hardware": hardware(device),
    }


def commit() -> str | None:
    """The commit of the checkout that this package lies in, "+" behind it with changes; None outside of one.

    None, too, where git is not installed, as in many containers.
    """
    folder = Path(__file__).resolve().parents[2]
    program = shutil.which("git")
    if program is None or not (folder / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(
            [program, "-C", str(folder), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    return f"{head}{'+' if git('status', '--porcelain', '--untracked-files=no') else ''}" if head else None


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine and the software that a measurement belongs to."""
    model = cpu_name()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        "cpu": model,
        "cores": physical_cores(),
        "threads": torch.get_num_threads(),
        "cpu_instructions": instruction_sets() or [torch.backends.cpu.get_cpu_capability()],
        "limits": {key: os.environ[key] for key in LIMITS if key in os.environ},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def machine_facts(machine: Mapping[str, Any]) -> dict[str, str]:
    """`hardware` for a page."""
    units = ", ".join(machine["cpu_instructions"])
    limits = "".join(f"; {key}={value}" for key, value in machine.get("limits", {}).items())
    return {
        "device": machine["device"],
        "processor": f"{machine['cpu']}, {machine['cores']} cores ({units}{limits}), {machine['threads']} threads",
        "software": f"torch {machine['torch']}, Python {machine['python']}, {machine['system']}",
    }


def origin_facts(data: Mapping[str, Any]) -> dict[str, str]:
    """Machine, versions, commit, command and time for a page; of old results what they have."""
    facts = machine_facts(data["hardware"]) if "hardware" in data else {}
    if "versions" in data:
        facts["versions"] = ", ".join(
            f"{name} {number}" for name, number in data["versions"].items() if number
        )
    for key in ("commit", "fingerprint", "command", "time"):
        if data.get(key):
            facts[key] = str(data[key])
    if "time" not in data and "date" in data:
        facts["date"] = data["date"]
    return facts


def require_folder(out: Path) -> None:
    """Make the folder of the results; called before anything is measured, so that no work is lost for want of it.

    Raises `ValueError` naming `--out` and the folder if no file can be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: no results can be written there ({error.strerror})") from error


def stem(codecs: Sequence[str], machine: Mapping[str, Any], bench: str) -> str:
    """The file name of a result, without suffix: codec_hardware_date-time_bench."""
    name = _codec_slug(codecs[0]) + (f"-and-{len(codecs) - 1}-more" if len(codecs) > 1 else "")
    device = machine["device"]
    if device == machine["cpu"]:
        device = f"{device} {machine['cores']} cores"
    return f"{name}_{_slug(device)}_{datetime.now():%Y-%m-%d-%H%M%S}_{bench}"


def free_stem(out: Path, name: str) -> str:
    """`name`, or with a number behind it where `out` holds such a result: nothing is overwritten."""
    number, free = 1, name
    while (out / f"{free}.json").exists() or (out / f"{free}.html").exists():
        number += 1
        free = f"{name}-{number}"
    return free


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Whole or not at all; infinities and nan become null, which JSON can hold."""
    write_whole(path, (printable(json.dumps(finite(data), indent=1)) + "\n").encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """A result. Raises ValueError naming the file and what is wrong with it."""
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a result ({error})") from error
    if not isinstance(data, dict) or "bench" not in data:
        raise ValueError(f"{path}: no result of bench/ or inspect: it has no key 'bench'")
    return data


def print_threads(threads: int) -> None:
    """The line with which a bench begins."""
    flags = " ".join(instruction_sets())
    print(f"on {cpu_name()} ({flags}) with {threads} of {physical_cores()} cores", file=sys.stderr)


def print_left_out(left_out: Sequence[LeftOut]) -> None:
    """A line for each image that is in no number."""
    for item in left_out:
        print(printable(f"skipped {item.reason}"))


def print_last_line(data: Mapping[str, Any]) -> None:
    """End stdout with one line of JSON, so that a program can read what a person has just read."""
    print(json.dumps(finite(data), separators=(",", ":")), flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The table of a page on stdout, its columns aligned."""
    numeric = numeric_columns(rows, len(header))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = zip(row, widths, numeric, strict=True)
        line = "  ".join(c.rjust(width) if right else c.ljust(width) for c, width, right in cells).rstrip()
        print(printable(line))


def number(value: float | None, digits: int) -> str:
    """A value for a table: `digits` after the point, "-" where it was not measured."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def decibels(value: float | None, digits: int = 2) -> str:
    """A PSNR for a table or a sentence, without its unit.

    "infinite" where a picture came back unchanged, or where one did among those of a mean: infinity itself, or None,
    which is what JSON has for it.
    """
    return "infinite" if value is None or math.isinf(value) else number(value, digits)


def signed(value: float | None, digits: int) -> str:
    """A difference for a table, with its sign; "-" where one of the two sides is infinite, so that there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:+.{digits}f}"


def numeric_columns(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
    """Which columns hold only numbers, with or without a unit behind them."""
    return [all(re.match(r"[-+\u2212]?(\d|inf|$)", row[i]) for row in rows) for i in range(columns)]


def short_path(text: str) -> str:
    """A path as its reader needs it: relative to the working folder where it lies below, else its last two parts."""
    path = Path(text)
    if not path.is_absolute():
        return text
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "/".join(path.parts[-2:])


def short_names(sources: Sequence[str]) -> list[str]:
    """`short_path` of each codec's source; as given where two would have the same name."""
    names = [short_path(source) for source in sources]
    return [name if names.count(name) == 1 else given for name, given in zip(names, sources, strict=True)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _codec_slug(source: str) -> str:
    """`runs/photos/codec` -> photos-codec, `owner/name` -> owner-name, `sd.json` -> sd."""
    path = Path(source)
    return _slug(path.stem if path.is_file() else "-".join(path.parts[-2:]))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
