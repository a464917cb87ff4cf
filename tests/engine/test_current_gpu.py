"""A pass runs while the GPU of its input is the current one. Without a GPU: what would set it is watched."""

import sys
from pathlib import Path

import pytest
import torch
from stock_pairs import CONFIGS, pair

sys.path.insert(0, str(Path(__file__).parents[1] / "vae"))
from small_vaes import small_vae

from latentcodec import optimize_vae
from latentcodec.engine.streams import StreamPass
from latentcodec.engine.strips import StripPass
from latentcodec.ops import functional
from latentcodec.ops.functional import norm_silu
from latentcodec.ops.pointwise import Kernels


@pytest.fixture
def current(monkeypatch):
    """The tensors whose GPU is the current one, those of contexts within contexts last."""
    tensors = []

    class Watched(torch.cuda.device_of):
        def __init__(self, x):
            super().__init__(x)
            self.x = x

        def __enter__(self):
            tensors.append(self.x)
            super().__enter__()

        def __exit__(self, *error):
            assert tensors.pop() is self.x
            super().__exit__(*error)

    monkeypatch.setattr(torch.cuda, "device_of", Watched)
    return tensors


def watched(monkeypatch, owner, name, current):
    """The shapes of the tensors whose GPU was the current one when the method `name` ran."""
    shapes, run = [], getattr(owner, name)

    def note(*given, **options):
        shapes.append([tuple(x.shape) for x in current])
        return run(*given, **options)

    monkeypatch.setattr(owner, name, note)
    return shapes


def test_strips_run_on_the_gpu_of_their_image(monkeypatch, current):
    _, vae = pair(CONFIGS["f4"])
    optimize_vae(vae, keep_packed=False)
    shapes = (
        watched(monkeypatch, StripPass, "encode", current),
        watched(monkeypatch, StripPass, "decode", current),
    )
    with torch.no_grad():
        vae.decode(vae.encode(torch.rand(2, 3, 16, 24)).latent_dist.mode())
    assert shapes == ([[(2, 3, 16, 24)]], [[(2, 4, 4, 6)]])
    assert not current


def test_streams_run_on_the_gpu_of_their_image(monkeypatch, current):
    vae = optimize_vae(small_vae("qwen"))
    shapes = watched(monkeypatch, StreamPass, "encode", current)
    with torch.no_grad():
        vae.encode(torch.rand(1, 3, 1, 16, 16))
    assert shapes == [[(1, 3, 16, 16)]]


def test_a_fused_norm_runs_on_the_gpu_of_its_map(monkeypatch, current):
    monkeypatch.setattr(functional, "fastest_kernels", lambda _: Kernels())
    shapes = watched(monkeypatch, Kernels, "normalise_", current)
    norm_silu(torch.rand(1, 4, 6, 6, requires_grad=True), torch.ones(4), torch.zeros(4), 2, 1e-6)
    assert shapes == [[(1, 4, 6, 6)]]
