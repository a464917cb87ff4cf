"""Native direct convolutions equal those in float64, for any number of channels, taps, strides and threads."""

import random

import pytest
import torch
import torch.nn.functional as F

from latentcodec.ops.native import convolution
from latentcodec.ops.native.build import library
from latentcodec.ops.native.convolution import DirectConvolution, Workspace


@pytest.mark.parametrize("seed", range(30))
def test_any_shape_equals_float64(seed):
    draws = random.Random(seed)
    torch.manual_seed(seed)
    batch, rows, columns = draws.randint(1, 3), draws.randint(3, 12), draws.randint(3, 14)
    inputs, outputs = draws.choice([1, 3, 8, 13, 32]), draws.choice([1, 3, 8, 15, 16, 17, 40])
    size, stride = draws.choice([1, 3]), draws.choice([1, 2])
    padding = draws.randint(0, size // 2)
    x, weight = torch.randn(batch, rows, columns, inputs), torch.randn(outputs, inputs, size, size)
    if draws.random() < 0.5:
        x, weight = (
            x.transpose(1, 2).contiguous().transpose(1, 2),
            weight.contiguous(memory_format=torch.channels_last),
        )
    bias = torch.randn(outputs) if draws.random() < 0.5 else None
    exact = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), None, stride, (0, padding))
    exact = exact.permute(0, 2, 3, 1) + (0 if bias is None else bias)
    residual = torch.randn(exact.shape) if draws.random() < 0.5 else None
    before = torch.get_num_threads()
    torch.set_num_threads(draws.randint(1, 4))
    run = DirectConvolution(library(), weight, stride, padding, lambda: None).using(Workspace())
    y = run(x, bias, residual)
    torch.set_num_threads(before)
    torch.testing.assert_close(
        y.double(), exact if residual is None else exact + residual, rtol=1e-5, atol=1e-4
    )


def test_large_maps_go_to_the_other_convolution(monkeypatch):
    monkeypatch.setattr(convolution, "MOST_RESULTS", 8)
    run = DirectConvolution(library(), torch.randn(4, 3, 3, 3), 1, 1, lambda: lambda *given: "other")
    assert run.using(Workspace())(torch.randn(1, 5, 3, 3), None, None) == "other"
