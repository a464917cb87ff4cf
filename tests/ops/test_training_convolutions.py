"""Winograd's convolutions with gradients equal the direct ones in float64, and give way where they are not suited."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stock_pairs import config, pair
from torch import nn

from latentcodec.engine.layers import conv
from latentcodec.ops.functional import conv3x3, norm_silu, suits_winograd, upsample_conv
from latentcodec.ops.native import weight_gradient
from latentcodec.ops.native.build import library
from latentcodec.ops.native.winograd import Scheme


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


def conv3x3_of_torch(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


def doubled_conv(x, weight, bias):
    return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (17, 30), (33, 18)])
@pytest.mark.parametrize("channels", [(16, 32), (48, 16), (64, 64)])
def test_values_and_gradients_of_doubled_maps_are_those_of_float64(channels, size, has_bias):
    inputs, outputs = channels
    x = torch.randn(2, inputs, *size).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(outputs, inputs, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    bias = torch.randn(outputs, requires_grad=True) if has_bias else None
    given = [value for value in (x, weight, bias) if value is not None]
    exact = [value.detach().double().requires_grad_() for value in given]
    dy = torch.randn(2, outputs, 2 * size[0], 2 * size[1])
    y, expected = upsample_conv(x, weight, bias), doubled_conv(*exact, *([] if has_bias else [None]))
    assert "Winograd" in type(y.grad_fn).__name__
    close(y, expected)
    gradients = torch.autograd.grad(y, given, dy)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        close(ours, theirs)


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(weight_gradient, "threads_for", lambda work: request.param)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("doubles", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (4, 4), (5, 1), (9, 14), (31, 34)])
@pytest.mark.parametrize("images", [1, 3])
def test_weight_gradients_of_slices_are_those_of_float64(images, size, doubles, threads):
    (rows, columns), times = size, 1 + doubles

    def sliced(channels, times):  # every second image, some rows of each
        made = torch.randn(2 * images, times * rows + 5, times * columns, channels)
        return made[::2, 2 : 2 + times * rows].permute(0, 3, 1, 2)

    x, dy, weight = sliced(48, 1), sliced(32, times), torch.randn(32, 48, 3, 3)
    for given in (weight, weight.to(memory_format=torch.channels_last)):
        exact = given.double().requires_grad_(), torch.zeros(32, dtype=torch.float64, requires_grad=True)
        map_ = F.interpolate(x.double(), scale_factor=float(times))
        theirs = torch.autograd.grad(F.conv2d(map_, *exact, padding=1), exact, dy.double())
        ours = weight_gradient.weight_gradient(dy, x, given, Scheme(4, doubles))
        assert ours[0].stride() == given.stride()
        close(ours[0], theirs[0])
        close(ours[1], theirs[1])


@pytest.mark.parametrize("doubles", [False, True])
def test_a_number_of_threads_has_one_weight_gradient_to_the_last_bit(doubles, threads):
    x, dy = torch.randn(2, 16, 45, 45), torch.randn(2, 16, 45 * (1 + doubles), 45 * (1 + doubles))
    x, dy = (value.to(memory_format=torch.channels_last) for value in (x, dy))
    weight = torch.empty(16, 16, 3, 3)
    first = weight_gradient.weight_gradient(dy, x, weight, Scheme(4, doubles))
    for _ in range(20):
        again = weight_gradient.weight_gradient(dy, x, weight, Scheme(4, doubles))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_large_sums_of_a_bias_keep_their_digits():
    dy = torch.full((4, 16, 256, 256), 0.1).to(memory_format=torch.channels_last)
    _, dbias = weight_gradient.weight_gradient(dy, torch.ones_like(dy), torch.empty(16, 16, 3, 3))
    close(dbias, dy.double().sum((0, 2, 3)), 3e-7)


@pytest.mark.parametrize("convolve", [conv3x3, upsample_conv])
def test_few_tiles_of_many_channels_get_torch_s_weight_gradient(monkeypatch, convolve):
    monkeypatch.setattr(weight_gradient, "CACHED_WEIGHT", 1)  # all weights are large
    monkeypatch.delattr(weight_gradient, "weight_gradient")
    x = torch.randn(1, 16, 16, 16).to(memory_format=torch.channels_last)
    given = torch.randn(16, 16, 3, 3, requires_grad=True), torch.randn(16, requires_grad=True)
    exact = [value.detach().double().requires_grad_() for value in given]
    y, reference = convolve(x, *given), doubled_conv if convolve is upsample_conv else conv3x3_of_torch
    gradients = torch.autograd.grad(y.square().sum(), given)
    theirs = torch.autograd.grad(reference(x.double(), *exact).square().sum(), exact)
    for one, other in zip(gradients, theirs, strict=True):
        close(one, other)


def test_weight_gradients_are_native_where_they_are_faster():
    many, few = torch.Size((2, 512, 128, 128)), torch.Size((1, 512, 16, 16))
    weight = torch.empty(512, 512, 3, 3)
    assert weight_gradient.suits(weight, many) == (
        torch.get_num_threads() <= 14
    )  # memory for the sums of all
    assert not weight_gradient.suits(weight, few)
    assert not weight_gradient.suits(torch.empty(16, 12, 3, 3), many)


def test_only_what_is_asked_for_is_computed():
    x = torch.randn(1, 16, 16, 16).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(16, 16, 3, 3, requires_grad=True), torch.randn(16)
    y = conv3x3(x, weight, bias)
    y.sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None
    weight, bias = torch.randn(16, 16, 3, 3), torch.randn(16, requires_grad=True)
    conv3x3(x, weight, bias).sum().backward()
    close(bias.grad, torch.full((16,), 256.0))


@pytest.mark.parametrize(
    "pair_of_functions",
    [(conv3x3, conv3x3_of_torch), (upsample_conv, doubled_conv)],
    ids=["plain", "doubled"],
)
def test_gradients_of_gradients_are_torch_s(pair_of_functions):
    x = torch.randn(1, 16, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(16, 16, 3, 3, requires_grad=True), torch.randn(16, requires_grad=True)
    seconds = []
    for function in pair_of_functions:
        (first,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), (x, weight)))
    for ours, theirs in zip(*seconds, strict=True):
        close(ours, theirs)


def norm_silu_4(x, weight, bias):
    return norm_silu(x, weight, bias, 4, 1e-6)


@pytest.mark.parametrize(
    "function", [conv3x3, upsample_conv, norm_silu_4], ids=lambda function: function.__name__
)
@pytest.mark.parametrize("is_transform", [False, True], ids=["is_grads_batched", "vmap"])
def test_many_gradients_at_once_are_those_one_by_one(function, is_transform):
    assert library() is not None
    x = torch.randn(1, 16, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    shape = (16,) if function is norm_silu_4 else (16, 16, 3, 3)
    given = x, torch.randn(shape, requires_grad=True), torch.randn(16, requires_grad=True)
    y = function(*given)
    dys = torch.randn(3, *y.shape)
    one_by_one = [torch.autograd.grad(y, given, dy, retain_graph=True) for dy in dys]
    if is_transform:
        found = torch.vmap(lambda dy: torch.autograd.grad(y, given, dy, retain_graph=True))(dys)
    else:
        found = torch.autograd.grad(y, given, dys, retain_graph=True, is_grads_batched=True)
    for ours, *theirs in zip(found, *one_by_one, strict=True):
        close(ours, torch.stack(theirs))


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
