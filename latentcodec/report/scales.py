"""The scales on which a page shows the measures of a latent space, with codecs that are known.

Published values are those of arXiv:2606.03578 (f16d32) and, for Stable Diffusion's rate, of its posterior variance of
about 1e-8. The others were measured by `quality/health.py` on windows of 256 pixels: KLTs on 40 photographs that they
were fitted to, bundled codecs on 100. A bundled codec is named with its date: the name without it changes its weights.

The limits are those of `quality/verdicts.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentcodec.quality import verdicts as limits


@dataclass(frozen=True)
class Scale:
    """One measure on a page."""

    name: str
    meaning: str
    """What it says, in one sentence."""
    low: float
    high: float
    limit: float
    """Where the rule begins to object."""
    larger_is_better: bool
    digits: int = 2
    percent: bool = False
    logarithmic: bool = False
    marks: tuple[tuple[str, float], ...] = ()
    """Known codecs and their values."""

    def text(self, value: float) -> str:
        """The value with its unit."""
        return f"{value:.{self.digits}%}" if self.percent else f"{value:.{self.digits}f}"

    def position(self, value: float) -> float:
        """0 to 100 along the bar; what lies outside sits at its end."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-9))
        return 100 * min(1.0, max(0.0, (value - low) / (high - low)))


SCALES: dict[str, Scale] = {
    "sec": Scale(
        "energy in high frequencies (SEC)",
        "The smoother a latent, the easier a diffusion model learns it; it ranks networks of one normalisation.",
        0.0, 1.0, limits.LARGEST_SEC, False, 0, True,
        marks=(
            ("best published f16d32", 0.04),
            ("conv f16d32", 0.42),
            ("photo-f8c4-2026-11-26", 0.44),
            ("KLT f8c16", 0.68),
            ("white noise", 0.87),
        ),
    ),
    "noise_1db": Scale(
        "noise that costs 1 dB, deviations",
        "A generator's latents are never exact; what the decoder bears of that.",
        0.01, 1.0, limits.SMALLEST_NOISE_BORNE, True, 3, logarithmic=True,
        marks=(("KLT f8c16", 0.053), ("photo-f8c4-2026-11-26", 0.096), ("KLT f8c4", 0.105)),
    ),
    "rate_bits": Scale(
        "rate, bits an element",
        "Free of scale. Above the limit nothing lies between the codes, which only sampling from N(0, I) minds.",
        0.0, 20.0, limits.LARGEST_RATE, False, 1, marks=(("photo-f8c4-2026-11-26", 10.0), ("Stable Diffusion 1", 15.0)),
    ),
    "signal_share": Scale(
        "signal in the most informed channel",
        "The share of a channel's variance that depends on the image; 0 is a collapsed posterior.",
        0.0, 1.0, limits.SMALLEST_SHARE, True, 1, True,
    ),
    "decoder_spread": Scale(
        "variance of decoded images over that of images",
        "Near 0 the decoder draws the same picture for every latent.",
        0.0, 1.0, limits.SMALLEST_SPREAD, True, 1, True,
    ),
    "draw_cost_db": Scale(
        "cost of a draw against the mean, dB",
        "How much worse a draw from the posterior decodes than its mean.",
        0.0, 3.0, limits.LARGEST_DRAW_COST, False, 2,
    ),
    "within_3": Scale(
        "draws within three deviations",
        "Heavy tails hurt the noise schedule and 8 bits.",
        0.96, 1.0, limits.SMALLEST_WITHIN_3, True, 1, True,
        marks=(("KLT f8c16", 0.977), ("photo-f8c4-2026-11-26", 0.989), ("normal", 0.9973)),
    ),
    "int8_loss_db": Scale(
        "cost of 8 bits, dB",
        "Latents rounded to 256 levels, a scale for each channel of an image.",
        0.0, 0.1, limits.LARGEST_INT8_LOSS, False, 3,
        marks=(("photo-f8c4-2026-11-26", 0.003), ("KLT f8c16", 0.007)),
    ),
    "dead_share": Scale(
        "dead channels",
        "Channels of noise, constant ones, and those that the decoder ignores.",
        0.0, 1.0, limits.DEAD_SHARE, False, 0, True,
    ),
    "hole_share": Scale(
        "draws of N(0, I) far from every code",
        "The decoder has not learnt what to make of such a draw.",
        0.0, 1.0, 0.3, False, 0, True,
    ),
}  # fmt: skip

RULES = {  # which rules speak of a measure
    "sec": {"rough_spectrum"},
    "noise_1db": {"fragile"},
    "rate_bits": {"nearly_autoencoder"},
    "signal_share": {"posterior_collapse"},
    "decoder_spread": {"posterior_collapse"},
    "draw_cost_db": {"too_noisy"},
    "within_3": {"heavy_tails"},
    "int8_loss_db": {"int8_loss"},
    "dead_share": {"dead_channels"},
    "hole_share": {"holes"},
}


def lines(measures: Mapping[str, Any], verdicts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For `Page.scales`: each measure that was taken, the worst that a headline says of it, and known codecs."""
    worst: dict[str, str] = {}
    for verdict in verdicts.values():
        for entry in (*verdict["reasons"], *verdict["notes"]):
            before = worst.get(entry["rule"], "healthy")
            worst[entry["rule"]] = max(
                before, entry["level"], key=["healthy", "note", "warning", "failure"].index
            )
    result = []
    for key, scale in SCALES.items():
        value = measures.get(key)
        if value is None:
            continue
        unknown = "note" if "posterior_collapse" in worst else "healthy"  # nothing else is judged then
        level = next((worst[rule] for rule in RULES[key] if rule in worst), unknown)
        limit = scale.limit if key != "hole_share" else measures["hole_share_ideal"] + limits.MORE_HOLES
        edge = scale.position(limit)
        low, high = {"start": 0.0, "width": edge}, {"start": edge, "width": 100 - edge}
        bad, good = (low, high) if scale.larger_is_better else (high, low)
        side = "at least" if scale.larger_is_better else "at most"
        result.append(
            {
                "name": scale.name,
                "text": scale.text(value),
                "meaning": scale.meaning,
                "level": level,
                "sentence": f"{scale.name}: {scale.text(value)}; good is {side} {scale.text(limit)}",
                "position": scale.position(value),
                "zones": [bad | {"level": "warning"}, good | {"level": "healthy"}],
                "marks": [
                    {"label": label, "position": scale.position(known), "text": scale.text(known)}
                    for label, known in scale.marks
                ],
            }
        )
    return result
