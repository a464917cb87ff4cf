"""Functions of feature maps with gradients, for training, and which kernels a device has for them.

torch's group norm takes channels-last maps apart and puts them together again, in float32 under autocast, and hands
them to the activation: on a GPU that takes longer than the convolutions of a training step (LOG.md). Here a map is read
twice and written once, and on the way back map and gradient are read twice. On CPUs it is also the exacter one: torch
loses digits where a mean is far above the deviation. And a convolution of a doubled map is Winograd's, or it is the
transposed one that it equals: 4/9 of the multiplications, and no doubled map.

Shapes: B batch, C channels, H W rows and columns.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as forward_mode
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._triton import has_triton

from latentcodec.ops.convolutions import fold_upsample_weight
from latentcodec.ops.native import weight_gradient, winograd
from latentcodec.ops.native.build import library
from latentcodec.ops.native.pointwise import NativeKernels
from latentcodec.ops.pointwise import REFERENCE_KERNELS, Kernels

log = logging.getLogger(__name__)


def is_ordinary(x: Tensor) -> bool:
    """Whether x is a plain tensor, and nothing but autograd follows what is done with it.

    Compilers and tracers would record our operations in place of the layers'; vmap, jvp, forward-mode derivatives and
    dispatch modes (make_fx, fake tensors) have no rule for them; function modes but that of a device (`with device:`)
    look for the layers' own; subclasses of tensors bring operations of their own.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
        and forward_mode._current_level < 0
    )


def applies_to(x: Tensor) -> bool:
    """Whether the functions of this file are for x, a map that gradients may be asked for.

    It is in channels_last and not in float64.
    """
    return (
        torch.is_grad_enabled()  # else there are the strips
        and is_ordinary(x)
        and x.device.type in ("cpu", "cuda")
        and x.dtype != torch.float64  # sums are in float32
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and fastest_kernels(x.device.type) is not REFERENCE_KERNELS
    )


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU(group_norm(x)); x [B, C, H, W] in channels_last -> the same; weight, bias [C]."""
    with torch.cuda.device_of(x):  # Triton takes the current GPU; on the way back autograd makes it that of x
        y: Tensor = _NormSiLU.apply(x, weight, bias, groups, eps)
    return y


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 3x3 convolution with zeros around; x [B, C, H, W] in channels_last -> [B, O, H, W] likewise."""
    y: Tensor = _WinogradConv.apply(x, weight, bias, False)
    return y


def suits_winograd(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv3x3` is faster than torch's convolution and as exact: on CPUs in float32, for maps of many tiles."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and weight.shape[2:] == (3, 3)
        and x.shape[1] == weight.shape[1]
        and winograd.suits(weight, len(x) * x.shape[2] * x.shape[3])
    )


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest neighbour times two, then the 3x3 convolution; x [B, C, H, W] -> [B, C', 2H, 2W]."""
    if suits_winograd(x, weight):
        y: Tensor = _WinogradConv.apply(x, weight, bias, True)
        return y
    with torch.autocast(x.device.type, enabled=False):  # taps are added up before they are rounded
        folded = fold_upsample_weight(weight).contiguous(memory_format=torch.channels_last)
    return F.conv_transpose2d(x, folded, bias, 2, 1)


@cache
def fastest_kernels(device_type: str) -> Kernels:
    """Native ones for CPUs, in Triton for GPUs, or torch's functions where these cannot be had, which the log says.

    On CPUs the first call on a machine compiles them: a second or two.
    """
    if device_type == "cpu":
        native = library()
        return REFERENCE_KERNELS if native is None else NativeKernels(native)
    if device_type != "cuda" or not has_triton():
        log.warning(
            "no Triton for %s was found: the VAE runs on torch's functions, slower but equal", device_type
        )
        return REFERENCE_KERNELS
    from latentcodec.ops.triton_pointwise import TritonKernels  # not everywhere is there a Triton to import

    return TritonKernels()


class _NormSiLU(torch.autograd.Function):
    """SiLU(group_norm(x)); once differentiable by its own formulas (`Kernels.gradients`), by torch's from then on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        kernels, rows = fastest_kernels(x.device.type), x.detach().permute(0, 2, 3, 1)  # [B, H, W, C]
        moments = kernels.moments()
        moments.add(rows)
        norm = moments.norm(weight, bias, groups, eps, F.silu)
        y = torch.empty_like(rows)
        kernels.normalise_(y.flatten(1, 2), rows.flatten(1, 2), norm)
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps, ctx.known = groups, eps, (norm, moments.mean, moments.inverse)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if _needs_formulas_of_torch(dy):
            with torch.enable_grad():
                y = F.silu(F.group_norm(x, ctx.groups, weight, bias, ctx.eps))
            return *_gradients_of_torch(y, (x, weight, bias), dy), None, None
        rows, dy = x.detach().permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1).contiguous()
        dx, dweight, dbias = fastest_kernels(x.device.type).gradients(dy, rows, weight, *ctx.known)
        return dx.permute(0, 3, 1, 2), dweight, dbias, None, None


class _WinogradConv(torch.autograd.Function):
    """A 3x3 convolution, of x or of x doubled by nearest neighbours, whose result and gradients are Winograd's.

    Once differentiable by its own formulas, by torch's from then on. The gradient of the map is the convolution of the
    result's gradient with the weight turned by half a turn, its inputs and outputs exchanged; where the map was
    doubled, sums of 2 x 2 of that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, doubles: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.doubles = doubles
        given = None if bias is None else bias.detach()
        return winograd.whole_map(x.detach(), weight.detach(), given, winograd.Scheme(4, doubles))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if _needs_formulas_of_torch(dy):
            with torch.enable_grad():
                y = F.conv2d(
                    F.interpolate(x, scale_factor=2.0) if ctx.doubles else x, weight, bias, padding=1
                )
            return *_gradients_of_torch(y, (x, weight, bias), dy), None
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            scheme = winograd.Scheme(4, halves=ctx.doubles)
            dx = winograd.whole_map(dy, weight.detach(), None, scheme, turns=True)
        if ctx.needs_input_grad[1]:
            dweight, dbias = _weight_gradient(dy, x.detach(), weight.detach(), ctx.doubles)
        elif ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 2, 3))
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None, None


def _needs_formulas_of_torch(dy: Tensor) -> bool:
    """Whether a gradient of this gradient will be asked for, or dy is many at once, whose memory nobody can read.

    `torch.vmap` makes one kind of these, `torch.autograd.grad(..., is_grads_batched=True)` the other.
    """
    known = torch._C._functorch
    return torch.is_grad_enabled() or known.is_batchedtensor(dy) or known.is_legacy_batchedtensor(dy)


def _gradients_of_torch(y: Tensor, inputs: tuple[Tensor | None, ...], dy: Tensor) -> list[Tensor | None]:
    """Of y, which torch computed from `inputs`; None for those that need none."""
    wanted = [value for value in inputs if value is not None and value.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled()))
    return [next(found) if value is not None and value.requires_grad else None for value in inputs]


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, doubles: bool) -> tuple[Tensor, Tensor]:
    """The gradients of a 3x3 convolution's weight and bias: by Winograd, or torch's for few tiles of many channels."""
    scheme = winograd.Scheme(4, doubles)
    if weight_gradient.suits(weight, dy.shape, scheme):
        return weight_gradient.weight_gradient(dy, x, weight, scheme)
    x, ones = F.interpolate(x, scale_factor=2.0) if doubles else x, [1, 1]
    # Stride, padding and dilation are 1; not transposed, no padding of the result, one group.
    _, dweight, dbias = torch.ops.aten.convolution_backward(
        dy, x, weight, [len(weight)], ones, ones, ones, False, [0, 0], 1, [False, True, True]
    )
    return dweight, dbias
