"""The kernels for GPUs equal those of torch: on a GPU as they are, elsewhere interpreted (see conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stock_pairs import CONFIGS, differences, whole_and_strips

from latentcodec.ops.pointwise import REFERENCE_KERNELS, Norm

pointwise = pytest.importorskip("latentcodec.ops.triton_pointwise", exc_type=ImportError)
triton_kernels = pytest.importorskip("latentcodec.ops.triton_kernels", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels():
    return pointwise.TritonKernels()


def close(actual, expected, dtype):
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=8 * eps)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, F.silu, F.gelu, F.mish, F.relu])
@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_windows_are_equal(kernels, dtype, activation, above, below):
    B, r, W, C = 2, 3, 5, 12
    strip = random(B, 9, W, C, dtype=dtype)[:, 2:5]  # of a larger map: images do not follow one another
    around = [random(B, 4, W, C, dtype=dtype) if there else None for there in (above, below)]
    norm = Norm(random(B, 1, C), random(B, 1, C), activation)
    for given in (norm, None):
        results = [torch.full((B, r + 2, W, C), float("nan"), device=DEVICE, dtype=dtype) for _ in range(2)]
        for form, out in zip((REFERENCE_KERNELS, kernels), results, strict=True):
            form.window_(out, around[0], strip, around[1], given)
        close(results[1], results[0], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("below", [False, True])
def test_halving_windows_are_equal(kernels, dtype, below):
    B, r, W, C = 2, 4, 5, 12
    strip = random(B, 9, W, C, dtype=dtype)[:, 2:6]
    under = random(B, 3, W, C, dtype=dtype) if below else None
    results = [torch.full((B, r + 1, W + 1, C), float("nan"), device=DEVICE, dtype=dtype) for _ in range(2)]
    for form, out in zip((REFERENCE_KERNELS, kernels), results, strict=True):
        form.halving_window_(out, strip, under)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalising_a_map_is_equal(kernels, dtype):
    x, norm = random(2, 77, 48, dtype=dtype), Norm(random(2, 1, 48), random(2, 1, 48), None)
    results = [torch.empty_like(x) for _ in range(2)]
    for form, out in zip((REFERENCE_KERNELS, kernels), results, strict=True):
        form.normalise_(out, x, norm)
    close(results[1], results[0], dtype)


@pytest.mark.parametrize("left_out", ["nothing", "bias", "bias and residual", "bias of an inner map"])
@pytest.mark.parametrize("channels", [12, 64])
def test_moments_add_what_is_left_out_and_equal_a_group_norm(kernels, channels, left_out, monkeypatch):
    """A mean 3000 deviations from zero, with a trend over the rows, which is the variance between pieces."""
    monkeypatch.setattr(pointwise, "PROGRAMS", 3)
    monkeypatch.setattr(pointwise, "TILE", 256)
    B, W = 2, 7
    rows = torch.arange(20, device=DEVICE)[None, :, None, None]
    x = 3000 + rows + random(B, 20, W, channels)
    bias, residual = random(channels), random(B, 40, W, channels)[:, 10:30]
    y = x.clone()
    inner = left_out == "bias of an inner map"
    moments = kernels.moments(inner)
    for strip, other in zip(y.split(6, 1), residual.split(6, 1), strict=True):
        moments.add(  # strips of one map: images do not follow one another
            strip,
            None if left_out == "nothing" else bias,
            other if left_out == "bias and residual" else None,
        )
    x = x if left_out == "nothing" or inner else x + bias
    x = x + residual if left_out == "bias and residual" else x
    close(y, x, torch.float32)
    layer = torch.nn.GroupNorm(4, channels, eps=1e-6, device=DEVICE)
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    scale, shift, _ = moments.norm(layer.weight, layer.bias, 4, 1e-6, None)
    whole = (y.double() + bias if inner else y.double()).permute(0, 3, 1, 2)
    exact = F.group_norm(whole, 4, layer.weight.double(), layer.bias.double(), 1e-6).permute(0, 2, 3, 1)
    torch.testing.assert_close(y.double() * scale[:, None] + shift[:, None], exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_equal(kernels, dtype, spread, monkeypatch):
    """Also where the largest scores are far above the first ones, which weights are relative to."""
    if DEVICE == "cpu" and dtype != torch.float32:
        pytest.skip("products with another result type are there on GPUs only")
    monkeypatch.setattr(pointwise, "SCORES", 16)
    q, k, v = (random(2, 50, 16, dtype=dtype) for _ in range(3))
    k[:, 40:] *= spread
    v.clamp_(-2, 2)  # weights and results are rounded to 2 ** -9 of this in bfloat16
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    # 20 queries at a time
    torch.testing.assert_close(kernels.attend(q, k, v, 4 * 50 * 20).double(), exact, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="test_cuda.py has it there")
def test_a_network_in_strips_equals_diffusers(kernels):
    results = whole_and_strips(CONFIGS["sd"], batch=2, kernels=kernels, strip_bytes=1)
    assert max(differences(*results)) <= 1e-4


@pytest.mark.slow
def test_every_kernel_compiles_for_gpus_that_are_not_here():
    """The interpreter forgives what the compiler does not; another process, since this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = {
        name
        for name, value in vars(triton_kernels).items()
        if hasattr(value, "arg_names") and not name.startswith("_")  # those are parts of others
    }
    assert set(run.stdout.split()) == kernels
