"""Group norm and SiLU as one function equal torch's, in values and gradients, and give way where they must."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stock_pairs import CONFIGS, pair
from torch import nn

from latentcodec.engine.layers import Upsample, norm_act
from latentcodec.ops import functional
from latentcodec.ops.native.build import library
from latentcodec.ops.native.pointwise import NativeKernels
from latentcodec.ops.pointwise import Kernels

KERNELS = ["eager", "native", "triton"]


@pytest.fixture(params=KERNELS)
def device(request, monkeypatch):
    """Of the kernels that run: Triton's on a GPU, or interpreted (see conftest.py)."""
    if request.param != "triton":
        kernels = Kernels() if request.param == "eager" else NativeKernels(library())
        monkeypatch.setattr(functional, "fastest_kernels", lambda _: kernels)
        return "cpu"
    triton_kernels = pytest.importorskip("latentcodec.ops.triton_pointwise", exc_type=ImportError)
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 3)
    monkeypatch.setattr(triton_kernels, "TILE", 256)
    monkeypatch.setattr(triton_kernels, "MERGED", 8)
    monkeypatch.setattr(functional, "fastest_kernels", lambda _: triton_kernels.TritonKernels())
    return "cuda" if torch.cuda.is_available() else "cpu"


def layers(channels=12, groups=4, device="cpu"):
    norm = nn.GroupNorm(groups, channels, eps=1e-6, device=device)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm, nn.SiLU()


def maps(*shape, mean=0.0, device="cpu", dtype=torch.float32):
    x = (mean + torch.randn(*shape, device=device)).to(dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def values_and_gradients(function, x, norm, dy):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    return [y.detach(), *(g.detach() for g in torch.autograd.grad(y, (x, norm.weight, norm.bias), dy))]


def is_fused(y):
    return type(y.grad_fn).__name__ == "_NormSiLUBackward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_values_and_gradients_are_those_of_float64(device, dtype, mean):
    norm, silu = layers(device=device)
    x, dy = (maps(2, 12, 20, 9, mean=m, device=device, dtype=dtype) for m in (mean, 0.0))
    actual = values_and_gradients(lambda x: norm_act(x, norm, silu), x, norm, dy)
    exact_norm = copy.deepcopy(norm).double()
    exact = values_and_gradients(lambda x: silu(exact_norm(x)), x.double(), exact_norm, dy.double())
    for ours, theirs in zip(actual, exact, strict=True):
        eps = max(torch.finfo(dtype).eps, 3e-7 * mean)
        torch.testing.assert_close(
            ours.double(), theirs, rtol=2 * eps, atol=4 * eps * theirs.abs().max().item()
        )


def test_one_pixel_and_one_member_are_enough(device):
    norm, silu = layers(channels=4, groups=2, device=device)
    x, dy = maps(1, 4, 1, 1, device=device), maps(1, 4, 1, 1, device=device)
    assert is_fused(norm_act(x, norm, silu))
    actual = values_and_gradients(lambda x: norm_act(x, norm, silu), x, norm, dy)
    expected = values_and_gradients(lambda x: silu(norm(x)), x, norm, dy)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_gradients_of_gradients_are_those_of_torch(device):
    norm, silu = layers(device=device)
    x, dy = maps(2, 12, 5, 7, device=device), maps(2, 12, 5, 7, device=device)

    def penalty(function):
        (dx,) = torch.autograd.grad(function(x), x, dy, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, norm.weight, dy))

    actual = penalty(lambda x: norm_act(x, norm, silu))
    for ours, theirs in zip(actual, penalty(lambda x: silu(norm(x))), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_frozen_norm_and_a_frozen_map_are_spared(device):
    norm, silu = layers(device=device)
    x = maps(2, 12, 5, 7, device=device)
    norm_act(x.detach(), norm, silu).sum().backward()
    assert norm.weight.grad is not None
    norm.requires_grad_(False)
    norm_act(x, norm, silu).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["sd", "photo-f8c16"])
def test_a_network_in_channels_last_learns_what_diffusers_own_class_learns_in_float64(name):
    reference, ours = pair(CONFIGS[name])
    reference.double(), ours.to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 32, 24) * 2 - 1
    for vae, image in ((reference, x.double()), (ours, x)):
        moments = vae.encoder(image.to(memory_format=torch.channels_last))
        vae.decoder(moments[:, : vae.config.latent_channels]).square().mean().backward()
    for (key, theirs), (_, mine) in zip(reference.named_parameters(), ours.named_parameters(), strict=True):
        if theirs.grad is not None:
            assert (mine.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max() + 1e-7, key


def test_autocast_rounds_once_and_no_worse_than_torch():
    norm, silu = layers(channels=64, groups=8)
    conv = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    x = maps(2, 64, 16, 16, dtype=torch.bfloat16)
    exact = conv(silu(norm(x.float())))
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_act(x, norm, silu)
        errors = [(conv(value) - exact).square().mean() for value in (y, silu(norm(x)))]
    assert y.dtype == torch.bfloat16
    assert errors[0] <= 1.02 * errors[1]


def test_others_get_the_modules():
    """Who listens, what is not channels last, other activations, float64, and transforms of torch.func."""
    norm, silu = layers()
    x = maps(2, 12, 5, 7)
    assert is_fused(norm_act(x, norm, silu))
    heard = []
    handle = norm.register_forward_hook(lambda *_: heard.append(1))
    assert not is_fused(norm_act(x, norm, silu))
    assert heard
    handle.remove()
    assert not is_fused(norm_act(x.contiguous(), norm, silu))
    assert not is_fused(norm_act(x, norm, nn.GELU()))
    assert not is_fused(norm_act(x.double(), norm.double(), silu))
    norm.float()
    gradient = torch.func.grad(lambda x: norm_act(x, norm, silu).square().sum())(x.detach())
    (expected,) = torch.autograd.grad(F.silu(norm(x)).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("device", ["eager"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_doubled_map_is_convolved_as_torch_does_it(device, dtype):
    """In value and gradients, at the borders too, and with the taps added up before they are rounded."""
    upsample = Upsample(12).to(memory_format=torch.channels_last)
    conv = upsample.conv
    x, exact = maps(2, 12, 5, 7), copy.deepcopy(conv).double()
    results = []
    for layer, value, function in (
        (conv, x, upsample),
        (exact, x.double(), lambda x: exact(F.interpolate(x, scale_factor=2.0, mode="nearest"))),
    ):
        value = value.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and layer is conv):
            y = function(value)
        wanted = (value, layer.weight, layer.bias)
        results.append([y, *torch.autograd.grad(y.double().square().sum(), wanted)])
    assert type(results[0][0].grad_fn.next_functions[0][0]).__name__ != "UpsampleNearest2DBackward0"
    for ours, theirs in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
