"""Two results of one kind against each other: what changed, beyond what noise explains, and whether for the worse.

Noise is read from the results themselves where they hold it: the rounds of a timing, the images of a score, the seeds
of a denoiser. Where they do not, a change below `UNKNOWN_NOISE` of the value is called none, of decibels at most
`UNKNOWN_DECIBELS`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median, stdev
from typing import Any

from latentcodec.quality.fidelity import interval, student
from latentcodec.report.results import short_path

Result = Mapping[str, Any]
Numbers = Iterator[tuple[str, float]]
"""Name and value; the last word of a name is what was measured."""

UNKNOWN_NOISE = 0.02  # of the value, where a result does not say how sure it is
UNKNOWN_DECIBELS = 0.1  # two per cent of 30 dB would hide a loss that everybody sees
SMALLEST = {"dB": 0.005, "share": 0.001}  # changes that nobody would see
# Whether more is better, by the last word of a name; a number of no such word is compared and never judged.
BETTER_LARGE = ("psnr", "psnr_db", "ssim", "psnr_over_klt", "images_per_s", "share_of_peak", "time_over_ours",
                "noise_1db", "within_3", "signal_share", "decoder_spread", "skill", "draw_precision")  # fmt: skip
BETTER_SMALL = ("ms", "peak_mib", "rms_error", "lpips", "bits_per_pixel", "floor", "distance", "sec", "draw_cost_db",
                "int8_loss_db", "dead_share")  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One number in both results."""

    name: str
    before: float
    after: float
    noise: float
    """How much of the change chance explains: half of an interval of 95 %, or the spread of the rounds."""
    verdict: str
    """better, worse, or "" for a change within the noise and for numbers that are neither good nor bad."""

    @property
    def difference(self) -> float:
        """after - before."""
        return self.after - self.before


def compare(a: Result, b: Result) -> dict[str, Any]:
    """The result of kind "compare" for two results of one kind.

    Raises ValueError where they are of two kinds, of one that has no numbers to compare, or have none in common, and
    where one lacks what results of its kind hold today.
    """
    if a["bench"] != b["bench"]:
        raise ValueError(f"a result of {a['bench']} and one of {b['bench']} hold no numbers in common")
    before, after = numbers(a), numbers(b)
    common = [name for name in before if name in after]
    if not common:
        raise ValueError("the two results have no case in common: other codecs, sizes or sides")
    noises = _noises(a, b)
    changes = [_judged(name, before[name], after[name], noises.get(name)) for name in common]
    return {
        "bench": "compare",
        "kind": a["bench"],
        "changes": [{**asdict(change), "difference": change.difference} for change in changes],
        "regressions": sum(change.verdict == "worse" for change in changes),
        "improvements": sum(change.verdict == "better" for change in changes),
        "only_before": [name for name in before if name not in after],
        "only_after": [name for name in after if name not in before],
        "origins": [_origin(a), _origin(b)],
        "differs": _differences(_origin(a), _origin(b)),
    }


def _judged(name: str, before: float, after: float, noise: float | None) -> Change:
    key = name.rsplit(" ", 1)[-1]
    is_decibels = "psnr" in key or key.endswith("_db")
    if noise is None:
        unknown = UNKNOWN_NOISE * max(abs(before), abs(after))
        noise = min(unknown, UNKNOWN_DECIBELS) if is_decibels else unknown
    if is_decibels:
        noise = max(noise, SMALLEST["dB"])
    elif "ssim" in key or "lpips" in key:
        noise = max(noise, SMALLEST["share"])
    gain = after - before if key in BETTER_LARGE else before - after
    judged = key in BETTER_LARGE or key in BETTER_SMALL
    verdict = "" if not judged or abs(gain) <= noise else "better" if gain > 0 else "worse"
    return Change(name, before, after, noise, verdict)


# ---- the numbers of each kind of result


def numbers(data: Result) -> dict[str, float]:
    """Every finite number that two results of this kind can be compared by, by name.

    Raises ValueError for a kind that has none, and for a result that lacks what its kind holds today.
    """
    kind = data["bench"]
    if kind not in NUMBERS:
        raise ValueError(f"results of kind {kind!r} cannot be compared; those of {', '.join(NUMBERS)} can")
    try:
        return dict(NUMBERS[kind](data))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"a result of {kind} is of another version of its bench, or was edited ({error!r}): measure again"
        ) from error


def _throughput(data: Result) -> Numbers:
    for r in data["results"]:
        yield from _of(_case(r), r, ("ms", "peak_mib", "time_over_ours", "rms_error"))


def _reconstruction(data: Result) -> Numbers:
    for name, entry in _codecs(data).items():
        means = {key: entry[key]["mean"] for key in ("psnr", "ssim", "lpips")}
        yield from _of(name, means | {"psnr_over_klt": entry["psnr_over_klt"]})


def _rate_distortion(data: Result) -> Numbers:
    """Of the codecs; image formats stand beside them as a scale."""
    for name, entry in _codecs(data).items():
        for point in data["curves"][entry["codec"]]:
            yield from _of(f"{name} {point['label']}", point, ("bits_per_pixel", "psnr"))


def _robustness(data: Result) -> Numbers:
    for disturbance, value in data["psnr"].items():
        yield from _of(disturbance, {"psnr": value})


def _diffusability(data: Result) -> Numbers:
    for name, entry in _codecs(data).items():
        yield from _of(name, entry, ("distance", "skill", "floor", "gaussian", "noise"))


def _inspect(data: Result) -> Numbers:
    yield from _of("latents", data["measures"])


def _training(data: Result) -> Numbers:
    for place, run in enumerate(data["runs"], start=1):
        yield from _of(f"run {place}", run, ("psnr", "ssim", "images_per_s", "share_of_peak", "minutes"))


def _classic_vae(data: Result) -> Numbers:
    for name, run in data["runs"].items():
        yield from _of(name, run["looked"], ("psnr_db", "kl_nats", "sharpness", "draw_precision"))


NUMBERS: Mapping[str, Callable[[Result], Numbers]] = {
    "throughput": _throughput,
    "reconstruction": _reconstruction,
    "rate_distortion": _rate_distortion,
    "robustness": _robustness,
    "diffusability": _diffusability,
    "inspect": _inspect,
    "training": _training,
    "classic_vae": _classic_vae,
}
"""By the kind of a result, its "bench"."""


def _of(name: str, values: Mapping[str, Any], keys: tuple[str, ...] | None = None) -> Numbers:
    for key in keys or values:
        value = values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{name} {key}", float(value)


def _case(r: Mapping[str, Any]) -> str:
    return f"{r['direction']} {r['dtype']} {r['batch']} x {r['size']} {r['side']}"


def _codecs(data: Result) -> dict[str, Mapping[str, Any]]:
    """Several codecs by their names; one is compared whatever it is called, since that may be what changed."""
    entries = data["codecs"]
    return {entry["codec"] if len(entries) > 1 else "codec": entry for entry in entries}


# ---- how sure they are


def _noises(a: Result, b: Result) -> dict[str, float]:
    """By name, where both results say how sure they are."""
    if a["bench"] == "throughput":
        return _timing_noises(a, b)
    if a["bench"] == "reconstruction" and "images" in a and "images" in b:
        return _score_noises(a, b)
    if a["bench"] == "diffusability":
        return _seed_noises(a, b)
    return {}


def _timing_noises(a: Result, b: Result) -> dict[str, float]:
    """Of a median of rounds: twice its standard error in both runs together, and no less than 5 %.

    Two runs of one program on one shared machine differ by a few per cent; so a smaller change proves nothing.
    """
    noises: dict[str, float] = {}
    others = {_case(r): r for r in b["results"]}
    for r in a["results"]:
        other = others.get(_case(r))
        if other is None or not r.get("rounds_ms") or not other.get("rounds_ms"):
            continue
        errors = [_median_error(side["rounds_ms"]) for side in (r, other)]
        noises[f"{_case(r)} ms"] = max(2 * math.hypot(*errors), 0.05 * median(r["rounds_ms"]))
        if r["time_over_ours"] is not None:
            noises[f"{_case(r)} time_over_ours"] = 0.05 * r["time_over_ours"]
    return noises


def _median_error(rounds: list[float]) -> float:
    return 1.2533 * stdev(rounds) / math.sqrt(len(rounds)) if len(rounds) > 1 else 0.1 * rounds[0]


def _score_noises(a: Result, b: Result) -> dict[str, float]:
    """Half of the 95 % interval of the mean difference, image by image where both runs saw the same images."""
    noises: dict[str, float] = {}
    for name, (before, after) in _pairs(a, b).items():
        mine, others = (
            {row["file"]: row for row in data["images"].get(entry["codec"], [])}
            for data, entry in ((a, before), (b, after))
        )
        for metric in ("psnr", "ssim", "lpips", "psnr_over_klt"):
            pairs = [(_score(mine[n], metric), _score(others[n], metric)) for n in mine if n in others]
            low, high = interval([b - a for a, b in pairs if a is not None and b is not None])
            if not math.isnan(low):
                noises[f"{name} {metric}"] = (high - low) / 2
    return noises


def _score(row: Mapping[str, Any], metric: str) -> float | None:
    """A metric of one image; None where it was not measured or is infinite."""
    if metric != "psnr_over_klt":
        return row[metric]
    own, linear = row["psnr"], row.get("klt_psnr")
    return None if own is None or linear is None else own - linear


def _seed_noises(a: Result, b: Result) -> dict[str, float]:
    """Of a mean over seeds: half of the 95 % interval of the difference, and no less than where nothing is known.

    Student's, with as many degrees of freedom as there are seeds in both runs, less two: with two seeds each, half
    of it is 4.3 standard errors.
    """
    noises: dict[str, float] = {}
    for name, pair in _pairs(a, b).items():
        if any(entry["spread"] is None for entry in pair):  # of a single seed
            continue
        seeds = [len(entry["seeds"]) for entry in pair]
        error = math.hypot(*(entry["spread"] / math.sqrt(n) for entry, n in zip(pair, seeds, strict=True)))
        least = UNKNOWN_NOISE * max(entry["distance"] for entry in pair)
        noises[f"{name} distance"] = max(student(sum(seeds) - 2) * error, least)
        if all(entry["skill"] is not None for entry in pair):  # it is the distance, turned and scaled
            reach = min(entry["gaussian"] - entry["floor"] for entry in pair)
            noises[f"{name} skill"] = noises[f"{name} distance"] / reach
    return noises


def _pairs(a: Result, b: Result) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The codecs that both have, by the names that their numbers have."""
    others = _codecs(b)
    return {name: (entry, others[name]) for name, entry in _codecs(a).items() if name in others}


# ---- what else differs


def _origin(data: Result) -> dict[str, Any]:
    """What a reader must know to trust the comparison."""
    machine = data.get("hardware", {})
    codecs = [entry["codec"] for entry in data["codecs"]] if "codecs" in data else [data.get("codec", "")]
    prints = [entry.get("fingerprint") for entry in data.get("codecs", [data])]
    return {
        "codec": ", ".join(short_path(str(codec)) for codec in codecs),
        "fingerprint": ", ".join(str(value)[:16] for value in prints if value),
        "commit": data.get("commit") or "not recorded",
        "device": machine.get("device", "not recorded"),
        "instructions": " ".join(machine.get("cpu_instructions", [])),
        "threads": machine.get("threads"),
        "torch": machine.get("torch"),
        "folder": data.get("folder", ""),
        "measured in": data.get("features") or data.get("lpips", ""),
        "budget": ", ".join(f"{key} {value}" for key, value in data.get("budget", {}).items()),
        "time": data.get("time", data.get("date", "not recorded")),
    }


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What is not equal beside the numbers: a difference may come from there."""
    return [key for key in a if key != "time" and a[key] != b[key]]
