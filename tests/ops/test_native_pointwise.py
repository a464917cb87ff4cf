"""The native functions equal those in torch, for random shapes, strides, alignments and numbers of threads."""

import random

import pytest
import torch
import torch.nn.functional as F

from latentcodec.ops.native.build import library
from latentcodec.ops.native.pointwise import NativeKernels
from latentcodec.ops.pointwise import REFERENCE_KERNELS, RMS, Norm

NATIVE = NativeKernels(library())
DTYPES = [torch.float32, torch.bfloat16]
CASES = 25


@pytest.fixture(params=range(CASES))
def dice(request):
    """Draws for one case, whose threads are set; those of the test suite come back after it."""
    threads, draws = torch.get_num_threads(), random.Random(request.param)
    torch.manual_seed(request.param)
    torch.set_num_threads(draws.randint(1, 4))
    yield draws
    torch.set_num_threads(threads)


def shape(dice, most=3):
    """B, r, W, C."""
    return (
        dice.randint(1, most),
        dice.randint(1, 9),
        dice.randint(1, 40),
        dice.choice([1, 3, 8, 17, 32, 64, 100]),
    )


def strip(dice, dtype, size):
    """Values [B, r, W, C] somewhere within a larger map, at any alignment, or as torch would make them."""
    batch, rows, columns, channels = size
    kind = dice.choice(["dense", "rows of a map", "shifted", "channels first"])
    if kind == "rows of a map":
        return torch.randn(batch, rows + 5, columns, channels).to(dtype)[:, 3 : 3 + rows]
    if kind == "shifted":
        memory = torch.randn(batch * rows * columns * channels + 3).to(dtype)
        return memory[3:].view(size)
    if kind == "channels first":
        return torch.randn(batch, channels, rows, columns).to(dtype).permute(0, 2, 3, 1)
    return torch.randn(size).to(dtype)


def norm(dice, batch, channels, dtype):
    """A group norm, or one by the root mean square whose gain is of the map's dtype."""
    activation = dice.choice([None, F.silu])
    if dice.random() < 0.5:
        return RMS(torch.randn(channels).to(dtype), activation)
    scale, shift = torch.randn(2, batch, 1, channels)
    return Norm(scale, shift, activation)


def close(ours, theirs, dtype):
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows(dice, dtype):
    size = shape(dice)
    batch, rows, columns, channels = size
    middle = strip(dice, dtype, size)
    above, below = (
        strip(dice, dtype, (batch, dice.randint(1, 3), columns, channels)) if dice.random() < 0.7 else None
        for _ in range(2)
    )
    given = norm(dice, batch, channels, dtype) if dice.random() < 0.7 else None
    results = [torch.full((batch, rows + 2, columns, channels), 7.0, dtype=dtype) for _ in range(2)]
    for kernels, out in zip((NATIVE, REFERENCE_KERNELS), results, strict=True):
        kernels.window_(out, above, middle, below, given)
    close(*results, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_halving_windows(dice, dtype):
    batch, rows, columns, channels = size = shape(dice)
    middle = strip(dice, dtype, size)
    below = (
        strip(dice, dtype, (batch, dice.randint(1, 3), columns, channels)) if dice.random() < 0.7 else None
    )
    results = [torch.full((batch, rows + 1, columns + 1, channels), 7.0, dtype=dtype) for _ in range(2)]
    for kernels, out in zip((NATIVE, REFERENCE_KERNELS), results, strict=True):
        kernels.halving_window_(out, middle, below)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalised_maps(dice, dtype):
    size = shape(dice)
    x = strip(dice, dtype, size).flatten(1, 2)
    given = norm(dice, size[0], size[3], dtype)
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2)]
    for kernels, out in zip((NATIVE, REFERENCE_KERNELS), results, strict=True):
        kernels.normalise_(out, x, given)
    close(*results, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_moments_and_the_norm_that_follows(dice, dtype, mean):
    size = shape(dice)
    groups = dice.choice([n for n in range(1, size[3] + 1) if size[3] % n == 0])
    strips = [strip(dice, dtype, size) + torch.tensor(mean, dtype=dtype) for _ in range(3)]
    weight, bias = torch.randn(2, size[3])
    norms, moments = [], [NATIVE.moments(), REFERENCE_KERNELS.moments()]
    for gathered in moments:
        for part in strips:
            gathered.add(part)
        norms.append(gathered.norm(weight, bias, groups, 1e-6, None))
    x = torch.cat([part.double() for part in strips], 1)
    exact = F.group_norm(x.permute(0, 3, 1, 2), groups, weight.double(), bias.double(), 1e-6)
    for found in norms:
        ours = x * found.scale[:, None].double() + found.shift[:, None].double()
        tolerance = 1e-5 * exact.abs().max() * max(1.0, mean * found.scale.abs().max().item() / 10)
        assert (ours.permute(0, 3, 1, 2) - exact).abs().max() <= tolerance
    ours, theirs = moments
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.inverse, theirs.inverse, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dice, dtype):
    size = shape(dice)
    batch, _, _, channels = size
    dy, x = (strip(dice, dtype, size) for _ in range(2))
    known = [torch.randn(batch, 1, 1, channels) for _ in range(5)]
    sums = [
        kernels.gradient_sums(dy, x, *known[:3]).sum(2, dtype=torch.float64)
        for kernels in (NATIVE, REFERENCE_KERNELS)
    ]
    torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-5 * sums[1].abs().max().item())
    close(*(kernels.gradient(dy, x, *known) for kernels in (NATIVE, REFERENCE_KERNELS)), dtype)


def test_silu_keeps_its_limits():
    """Infinities, what is beyond the range of exp, and NaN give what torch gives."""
    x = torch.tensor(
        [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e5, -1e5, 90.0, -90.0, 0.0, -0.0]
    )
    x = x.view(1, -1, 1).expand(1, 11, 5).contiguous()
    ones, zeros, y = torch.ones(1, 1, 5), torch.zeros(1, 1, 5), torch.empty_like(x)
    NATIVE.normalise_(y, x, Norm(ones, zeros, F.silu))
    torch.testing.assert_close(y, F.silu(x), rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("channels", [3, 8, 100])
def test_pixels_of_no_length_infinite_and_nan_ones_keep_to_themselves(channels):
    x = torch.randn(1, 6, channels)
    x[0, 0], x[0, 1], x[0, 2, 1], x[0, 3, 2] = 0, 1e-18, float("inf"), float("nan")
    ours, theirs = torch.empty_like(x), torch.empty_like(x)
    NATIVE.normalise_(ours, x, RMS(torch.ones(channels), None))
    REFERENCE_KERNELS.normalise_(theirs, x, RMS(torch.ones(channels), None))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)


def test_a_number_of_threads_gives_one_result():
    x = torch.randn(2, 64, 80, 32)
    results = set()
    for _ in range(3):
        moments = NATIVE.moments()
        moments.add(x)
        results.add(moments.sums.sum().item())
    assert len(results) == 1


def test_float16_and_other_activations_are_torch_s():
    x = torch.randn(1, 6, 8)
    given = Norm(torch.randn(1, 1, 8), torch.randn(1, 1, 8), F.gelu)
    for value in (x, x.half()):
        ours, theirs = torch.empty_like(value), torch.empty_like(value)
        NATIVE.normalise_(ours, value, given)
        REFERENCE_KERNELS.normalise_(theirs, value, given)
        assert torch.equal(ours, theirs)


def test_a_window_of_another_format_than_its_strip_is_converted():
    given = torch.randn(1, 4, 6, 8).bfloat16()
    native, expected = torch.empty(2, 1, 6, 6, 8).unbind()
    NATIVE.window_(native, None, given, None, None)
    REFERENCE_KERNELS.window_(expected, None, given, None, None)
    assert torch.equal(native, expected)
