"""How a codec's latents are normalised, as an index states it.

Shapes: c latent channels.
"""

from __future__ import annotations

from typing import Any

from latentcodec.codec import LatentCodec


def normalisation_of(codec: LatentCodec) -> dict[str, Any]:
    """`mean` and `std` of each channel: z = (raw - mean) / std."""
    return {
        "mean": codec.latents_mean.flatten().tolist(),
        "std": codec.latents_std.flatten().tolist(),
    }
