"""Winograd's convolutions with gradients equal the direct ones in float64, and give way where they are not suited."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stock_pairs import config, pair
from torch import nn

from latentcodec.engine.layers import conv
from latentcodec.ops.functional import conv3x3, suits_winograd


def close(ours, exact, tolerance=1e-5):
    assert (ours - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (17, 30), (33, 18)])
@pytest.mark.parametrize("channels", [(16, 32), (48, 16), (64, 64)])
def test_values_and_gradients_are_those_of_float64(channels, size, has_bias):
    inputs, outputs = channels
    x = torch.randn(2, inputs, *size).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(outputs, inputs, 3, 3, requires_grad=True)
    bias = torch.randn(outputs, requires_grad=True) if has_bias else None
    given = [value for value in (x, weight, bias) if value is not None]
    exact = [value.detach().double().requires_grad_() for value in given]
    dy = torch.randn(2, outputs, *size)
    y, expected = conv3x3(x, weight, bias), F.conv2d(*exact, padding=1)
    close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    gradients = torch.autograd.grad(y, given, dy)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        close(ours, theirs)


def test_only_what_is_asked_for_is_computed():
    x = torch.randn(1, 16, 16, 16).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(16, 16, 3, 3, requires_grad=True), torch.randn(16)
    y = conv3x3(x, weight, bias)
    y.sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None


def test_gradients_of_gradients_are_torch_s():
    x = torch.randn(1, 16, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(16, 16, 3, 3, requires_grad=True), torch.randn(16, requires_grad=True)
    seconds = []
    for function in (conv3x3, lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1)):
        (first,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), (x, weight)))
    for ours, theirs in zip(*seconds, strict=True):
        close(ours, theirs)


def test_other_layers_and_inputs_get_torch_s_convolution():
    layer = nn.Conv2d(16, 16, 3, padding=1)
    x = torch.randn(1, 16, 32, 32).to(memory_format=torch.channels_last)

    def is_fast(x, layer):
        return "Winograd" in type(conv(x, layer).grad_fn).__name__

    assert is_fast(x, layer)
    assert not is_fast(x.contiguous(), layer)
    assert not is_fast(x[:, :, :4, :4].contiguous(memory_format=torch.channels_last), layer)
    reflecting = copy.deepcopy(layer)
    reflecting.padding_mode = "reflect"
    reflecting._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert not is_fast(x, reflecting)
    hooked = copy.deepcopy(layer)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_fast(x, hooked)
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits_winograd(x, layer.weight)
    assert not suits_winograd(x, torch.randn(12, 16, 3, 3))


def test_a_network_s_gradients_are_those_of_float64():
    reference, vae = pair(config(channels=(16, 32), groups=4))
    vae.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 48)
    outputs = []
    for model, given in ((reference.double(), x.double()), (vae, x)):
        y = model.decode(model.encode(given).latent_dist.mode()).sample
        y.square().mean().backward()
        outputs.append(y)
    close(outputs[1], outputs[0], 1e-4)
    theirs = dict(reference.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in theirs.values())
    for name, parameter in vae.named_parameters():  # that of a bias before a norm is zero, up to rounding
        exact = theirs[name].grad
        assert (parameter.grad - exact).abs().max() <= 1e-4 * exact.abs().max() + 1e-8 * largest, name
