"""Winograd's convolutions equal the direct one in float64, for all shapes, and give way where they would not."""

import random

import pytest
import torch
import torch.nn.functional as F

from latentcodec.ops.convolutions import window_convolution, window_upsample_convolution
from latentcodec.ops.native import winograd
from latentcodec.ops.native.build import library
from latentcodec.ops.native.winograd import (
    Scheme,
    WinogradConvolution,
    Workspace,
    convolve,
    transform_weight_,
    weight_values,
)

SCHEMES = [Scheme(4), Scheme(2), Scheme(4, doubles=True), Scheme(2, doubles=True)]


def direct(x, weight, bias, scheme, pads_rows):
    """In float64: [B, H, W, C] -> [B, H', W', O]; a window's outermost rows only lend their pixels."""
    x = F.interpolate(x.permute(0, 3, 1, 2).double(), scale_factor=float(scheme.times))
    y = F.conv2d(x, weight.double(), None if bias is None else bias.double(), padding=1)
    return (y if pads_rows else y[:, :, scheme.times : y.shape[2] - scheme.times]).permute(0, 2, 3, 1)


def transformed(weight, scheme):
    memory = torch.empty(weight_values(scheme, *weight.shape[:2]))
    return transform_weight_(memory, library(), weight, scheme)


def relative_error(ours, exact):
    return ((ours - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_any_shape_equals_float64(scheme, seed):
    draws = random.Random(seed)
    batch, rows, columns = draws.randint(1, 3), draws.randint(1, 11), draws.randint(1, 13)
    inputs, outputs = draws.choice([16, 32, 48]), draws.choice([16, 48, 80])
    pads_rows = draws.random() < 0.5
    x = torch.randn(batch, rows if pads_rows else rows + 2, columns, inputs)
    weight = torch.randn(outputs, inputs, 3, 3)
    if draws.random() < 0.5:
        weight = weight.to(memory_format=torch.channels_last)
    bias = torch.randn(outputs) if draws.random() < 0.5 else None
    exact = direct(x, weight, bias, scheme, pads_rows)
    residual = torch.randn(exact.shape) if draws.random() < 0.5 else None
    y = convolve(
        library(), x, transformed(weight, scheme), outputs, scheme, bias, residual, Workspace(), pads_rows
    )
    exact = exact if residual is None else exact + residual
    assert y.shape == exact.shape
    assert relative_error(y, exact) <= 2e-5


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_any_number_of_threads_gives_the_same(threads):
    x, weight = torch.randn(2, 14, 9, 64), torch.randn(64, 64, 3, 3)
    before = torch.get_num_threads()
    results = []
    for count in (before, threads):
        torch.set_num_threads(count)
        kernel = transformed(weight, Scheme(4))
        results.append(convolve(library(), x, kernel, 64, Scheme(4), None, None, Workspace()))
    torch.set_num_threads(before)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("doubles", [False, True])
@pytest.mark.parametrize("inputs", [64, 128])
def test_wide_layers_take_it_and_change_with_their_weight(doubles, inputs):
    """A kept transform is made anew, one that is not kept is made in every pass."""
    weight, bias = torch.randn(320, inputs, 3, 3), torch.randn(320)
    workspace = Workspace()
    scheme = Scheme(4, doubles)
    form = window_upsample_convolution if doubles else window_convolution
    settings = () if doubles else (1, 1)
    for _ in range(2):
        run = form(weight, bias, *settings, torch.float32, workspace)
        x = torch.randn(1, 18, 20, inputs)
        exact = direct(x, weight, bias, scheme, False)
        assert relative_error(run(x), exact) <= 1e-5
        assert workspace.values.numel(), "Winograd's convolution did not run"
        weight.data.mul_(1.5)


def test_memory_for_a_weight_is_used_again():
    workspace = Workspace()
    weights = [torch.randn(320, 128, 3, 3) for _ in range(3)]
    for weight in weights:
        window_convolution(weight, torch.zeros(320), 1, 1, torch.float32, workspace)(
            torch.randn(1, 18, 20, 128)
        )
    assert len(workspace.weights) == 1


def test_few_tiles_of_a_large_weight_are_convolved_directly():
    """Its transform would take longer than the convolution."""
    weight, bias, workspace = torch.randn(176, 176, 3, 3), torch.randn(176), Workspace()
    for rows in (5, 40):
        x = torch.randn(1, rows, 8, 176)
        y = window_convolution(weight, bias, 1, 1, torch.float32, workspace)(x)
        assert relative_error(y, direct(x, weight, bias, Scheme(4), False)) <= 1e-5
        assert (workspace.values.numel() > 0) == (rows == 40)


def test_a_weight_that_it_would_blur_gets_smaller_tiles_and_then_the_direct_convolution(monkeypatch):
    """By the error on noise, which this test moves rather than the weight: no weight was found that needs it."""
    weight = torch.randn(64, 64, 3, 3)
    errors = [winograd.error(library(), weight, scheme) for scheme in SCHEMES[:2]]
    assert 1e-7 < errors[1] < errors[0] < 5e-6
    for largest, expected in ((1.0, 4), (sum(errors) / 2, 2), (0.0, None)):
        monkeypatch.setattr(winograd, "LARGEST_ERROR", largest)
        best = WinogradConvolution.best(weight, False, lambda: None)
        assert (best and best.scheme.outputs) == expected


@pytest.mark.parametrize("kind", ["input", "output", "both", "tap", "sparse"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scaled_channels_and_outliers_cost_little(scheme, kind):
    """Relative to each output channel's own values, as weights of large models have them."""
    weight = torch.randn(64, 64, 3, 3)
    if kind in ("input", "both"):
        weight[:, 3] *= 1e3
    if kind in ("output", "both"):
        weight[5] *= 1e3
    if kind == "tap":
        weight[:, :, 0, 0] *= 1e3
    if kind == "sparse":
        weight[torch.rand_like(weight) < 0.001] *= 1e3
    assert winograd.error(library(), weight, scheme) <= 2e-5


def test_a_layer_of_zeros_is_exact():
    assert winograd.error(library(), torch.zeros(64, 64, 3, 3), Scheme(4)) == 0
