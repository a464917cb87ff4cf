"""Two results of one bench against each other: what changed, beyond what noise explains, and whether for the worse.

Noise is read from the results themselves where they hold it: the rounds of a timing, the images of a score. Where they
do not, a change below `UNKNOWN_NOISE` of the value is called none.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median, stdev
from typing import Any

from latentcodec.quality.fidelity import interval
from latentcodec.report.results import short_path

UNKNOWN_NOISE = 0.02  # of the value, where a result does not say how sure it is
SMALLEST = {"dB": 0.005, "share": 0.001}  # changes that nobody would see
# Whether more is better, by the end of a key; a number of no such key is compared and never judged.
BETTER_LARGE = ("psnr", "ssim", "psnr_over_klt", "images_per_s", "megapixels_per_s", "time_over_ours", "noise_1db",
                "psnr_db", "within_3", "signal_share", "decoder_spread", "share_of_peak", "skill")  # fmt: skip
BETTER_SMALL = ("ms", "peak_mib", "lpips", "rms_error", "max_error", "sec", "draw_cost_db", "int8_loss_db",
                "dead_share", "floor_distance", "distance", "minutes")  # fmt: skip


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


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The result of kind "compare" for two results of one kind. Raises ValueError where they are of two kinds."""
    if a["bench"] != b["bench"]:
        raise ValueError(f"a result of {a['bench']} and one of {b['bench']} hold no numbers in common")
    before, after = dict(_numbers(a)), dict(_numbers(b))
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
    if noise is None:
        noise = UNKNOWN_NOISE * max(abs(before), abs(after))
    if "psnr" in key or key.endswith("_db"):
        noise = max(noise, SMALLEST["dB"])
    elif "ssim" in key or "lpips" in key:
        noise = max(noise, SMALLEST["share"])
    gain = after - before if key in BETTER_LARGE else before - after
    judged = key in BETTER_LARGE or key in BETTER_SMALL
    verdict = "" if not judged or abs(gain) <= noise else "better" if gain > 0 else "worse"
    return Change(name, before, after, noise, verdict)


def _numbers(data: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of every number that two runs can be compared by; the last word of a name is its kind."""
    kind = data["bench"]
    if kind == "throughput":
        for r in data["results"]:
            yield from _of(_case(r), r, ("ms", "peak_mib", "time_over_ours", "rms_error"))
    elif kind == "reconstruction":
        for entry in data["codecs"]:
            flat = {key: entry[key]["mean"] for key in ("psnr", "ssim", "lpips")}
            yield from _of(_codec(data, entry), flat | {"psnr_over_klt": entry["psnr_over_klt"]})
    elif kind == "robustness":
        for key, value in data["psnr"].items():
            yield f"{key} psnr", value
    elif kind == "inspect":
        yield from _of("latents", data["measures"])
    elif kind == "training":
        for place, run in enumerate(data["runs"]):
            yield from _of(
                f"run {place + 1}", run, ("psnr", "ssim", "images_per_s", "share_of_peak", "minutes")
            )
    else:
        yield from _of(kind, {key: value for key, value in data.items() if key != "hardware"})


def _of(
    name: str, values: Mapping[str, Any], keys: tuple[str, ...] | None = None
) -> Iterator[tuple[str, float]]:
    for key in keys or values:
        value = values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{name} {key}", float(value)


def _case(r: Mapping[str, Any]) -> str:
    return f"{r['direction']} {r['dtype']} {r['batch']} x {r['size']} {r['side']}"


def _codec(data: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """Several codecs by their names; one is compared whatever it is called, since that may be what changed."""
    return entry["codec"] if len(data["codecs"]) > 1 else "codec"


def _noises(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float]:
    """By name, where both results say how sure they are."""
    if a["bench"] == "throughput":
        return _timing_noises(a, b)
    if a["bench"] == "reconstruction" and "images" in a and "images" in b:
        return _score_noises(a, b)
    return {}


def _timing_noises(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float]:
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


def _score_noises(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float]:
    """Half of the 95 % interval of the mean difference, image by image where both runs saw the same images."""
    noises: dict[str, float] = {}
    pairs = zip(a["codecs"], b["codecs"], strict=False)
    for (before, after), entry in zip(pairs, a["codecs"], strict=False):
        mine = {row["file"].split("/")[-1]: row for row in a["images"].get(before["codec"], [])}
        others = {row["file"].split("/")[-1]: row for row in b["images"].get(after["codec"], [])}
        for metric in ("psnr", "ssim", "lpips"):
            both = [n for n in mine if n in others and None not in (mine[n][metric], others[n][metric])]
            low, high = interval([others[n][metric] - mine[n][metric] for n in both])
            if not math.isnan(low):
                noises[f"{_codec(a, entry)} {metric}"] = (high - low) / 2
    return noises


def _origin(data: Mapping[str, Any]) -> dict[str, Any]:
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
        "time": data.get("time", data.get("date", "not recorded")),
    }


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What is not equal beside the numbers: a difference may come from there."""
    return [key for key in a if key != "time" and a[key] != b[key]]
