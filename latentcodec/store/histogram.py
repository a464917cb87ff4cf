"""How the latents of a store are distributed, from a sample of its pictures.

Shapes: c latent channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from latentcodec.store.read import LatentStore

PICTURES = 256  # that stand for the store
EDGES = np.arange(-4.0, 4.5, 0.5)  # of the histogram's bars; normalised latents have deviation 1
BARS = " ▁▂▃▄▅▆▇█"


def channel_statistics(store: LatentStore) -> dict[str, Any]:
    """`channel_mean` and `channel_std` [c], `largest` magnitude, and `histogram` as one line of bars from -4 to 4."""
    if not len(store):
        return {}
    numbers = np.unique(np.linspace(0, len(store) - 1, PICTURES).round().astype(int))
    cells = torch.cat([store[int(i)].latent.float().flatten(1) for i in numbers], 1)  # [c, cells]
    has_std = cells.shape[1] > 1  # one cell has none
    std = cells.std(1) if has_std else cells.new_full((len(cells),), torch.nan)
    counts, _ = np.histogram(cells.numpy(), EDGES)
    heights = np.ceil(counts / max(1, counts.max()) * (len(BARS) - 1)).astype(int)
    return {
        "channel_mean": [round(value, 3) for value in cells.mean(1).tolist()],
        "channel_std": [round(value, 3) for value in std.tolist()],
        "largest": round(cells.abs().max().item(), 3),
        "histogram": "-4 " + "".join(BARS[height] for height in heights) + " 4",
    }
