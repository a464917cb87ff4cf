"""Which regime the latents are in at a validation: collapsed, with dead channels, noisy, nearly an autoencoder.

The cheap measures of `quality/health.py` on windows of the held-out images: one encoding and one decoding of each. What
needs normalised latents is not judged here: a codec is normalised when it is saved.

Shapes: N images, C channels, H W pixels, c latent channels, h w latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.quality.decoder_measures import decoded, decoder_spread, posteriors
from latentcodec.quality.health import cut_windows, posterior_health
from latentcodec.quality.verdicts import TABLE, Finding, findings

WINDOW = 128  # pixels a side
MOST_IMAGES = 16
LOGGED = ("rate_bits", "signal_share", "noise", "dead_share", "decoder_spread", "sec", "kurtosis")
WATCHED = ("posterior_collapse", "dead_channels", "nearly_autoencoder", "too_noisy")
NAMES = {
    "posterior_collapse": "posterior collapse",
    "dead_channels": "dead channels",
    "nearly_autoencoder": "nearly an autoencoder",
    "too_noisy": "too noisy",
}


@dataclass
class Regimes:
    """Remembers what was said at the last validation, so that only a change is said."""

    broken: set[str] = field(default_factory=set)
    """The rules that were broken."""
    nothing_to_see: bool = False
    """Whether no image had a whole latent cell."""

    def look(
        self, codec: LatentCodec, images: Sequence[Tensor]
    ) -> tuple[dict[str, float], list[tuple[str, bool]]]:
        """Of `images` [C, H, W]: numbers for metrics.jsonl, and lines to say, each with whether it is a failure."""
        f = codec.downsampling_factor
        large = [image for image in images[:MOST_IMAGES] if min(image.shape[-2:]) >= f]
        if not large:  # they can be scored all the same, since a codec fills them up to whole cells
            said, self.nothing_to_see = self.nothing_to_see, True
            line = f"the regime of the latents is not looked at: no held-out image has a whole cell of {f} x {f} pixels"
            return {}, [] if said else [(line, False)]
        x, _ = cut_windows(large, f, WINDOW)
        mean, std = posteriors(codec, x)
        if not (mean.isfinite().all() and std.isfinite().all()):
            return {}, [("the latents of the held-out images are not finite", True)]
        health = posterior_health(mean, std, f)
        if len(x) > 1:  # there is no variance over one image
            y = decoded(codec, mean, (x.shape[-2], x.shape[-1]))
            health.measures["decoder_spread"] = decoder_spread(x.cpu(), y)
        found = {f.rule: f for f in findings(health.measures, health.channels) if f.rule in WATCHED}
        lines = [_entered(finding) for rule, finding in found.items() if rule not in self.broken]
        lines += [(f"left: {NAMES[rule]}", False) for rule in sorted(self.broken - found.keys())]
        self.broken = set(found)
        values = {key: health.measures.get(key) for key in LOGGED}
        known = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        return {f"latents/{key}": value for key, value in known.items()}, lines


def _entered(finding: Finding) -> tuple[str, bool]:
    """What a rule that is newly broken has to say, and whether it is a failure for diffusion."""
    diffusion, sampling, _ = TABLE[finding.rule]
    meaning = f"for a diffusion model: {diffusion}; for sampling from N(0, I): {sampling or 'nothing'}"
    failure = diffusion == "failure" or finding.serious
    return f"{finding.text} ({meaning}.) To change it: {finding.cure}.", failure
