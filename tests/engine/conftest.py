"""What several tests of the engine share: a pair of models in each memory layout, and a count of passes in strips."""

import pytest
import torch
from stock_pairs import CONFIGS, pair

from latentcodec.engine.strips import StripPass


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(torch.contiguous_format, id="nchw"),
        pytest.param(torch.channels_last, id="nhwc", marks=pytest.mark.slow),
    ],
)
def vaes(request):
    torch.manual_seed(0)
    return [vae.to(memory_format=request.param) for vae in pair(CONFIGS["sd"])]


@pytest.fixture
def strips(monkeypatch):
    """Counts the passes that run in strips."""
    passes = []
    for name in ("encode", "decode"):
        method = getattr(StripPass, name)
        monkeypatch.setattr(StripPass, name, lambda *args, m=method: passes.append(1) or m(*args))
    return passes
