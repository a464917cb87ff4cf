"""Layers of `blocks.py` as one function each, gradients included, and which kernels a device has for such.

torch's group norm takes channels-last maps apart and puts them together again, in float32 under autocast, and hands
them to the activation: on a GPU that takes longer than the convolutions of a training step (LOG.md). Here a map is read
twice and written once, and on the way back map and gradient are read twice. On CPUs it is also the exacter one: torch
loses digits where a mean is far above the deviation. And a convolution of a doubled map is the transposed one that it
equals: 4/9 of the multiplications, and no doubled map.

Shapes: B batch, C channels, H W rows and columns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcodec.ops.convolutions import folded
from latentcodec.ops.pointwise import WORTH_COMPILING, Kernels, compiled, has_compiler


def normalised(x: Tensor, norm: nn.GroupNorm, activation: nn.Module) -> Tensor:
    """activation(norm(x)); [B, C, H, W] -> [B, C, H, W].

    One function for maps in channels_last that are worth it, where gradients may be asked for; the modules themselves
    where something listens to them, where a compiler is at work, and for activations other than SiLU.
    """
    if not (_is_fused_for(x) and _can_fuse(norm, activation)):
        return activation(norm(x))
    y: Tensor = _NormSiLU.apply(x, norm.weight, norm.bias, norm)
    return y


def doubled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Nearest neighbour times two, then the 3x3 `conv`; [B, C, H, W] -> [B, C', 2H, 2W]. Where, as for `normalised`."""
    if not _is_fused_for(x) or type(conv) is not nn.Conv2d or is_listened_to(conv):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    with torch.autocast(x.device.type, enabled=False):  # taps are added up before they are rounded
        weight = folded(conv.weight).contiguous(memory_format=torch.channels_last)
    return F.conv_transpose2d(x, weight, conv.bias, 2, 1)


def compile_gradients(dtype: torch.dtype, batch: int) -> None:
    """Have ready for CPUs what training on maps of `dtype` needs of this file, whatever their sizes."""
    x = torch.zeros(batch, 32, 96, 160, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    normalised(x, nn.GroupNorm(4, 32), nn.SiLU()).sum().backward()


def fastest(device_type: str) -> Kernels:
    """As written for GPUs, as inductor makes them for CPUs, or uncompiled, which the log says."""
    if device_type != "cuda" or not has_compiler(device_type):
        return compiled(device_type)
    return _for_gpus()


@cache
def _for_gpus() -> Kernels:
    from latentcodec.ops.triton_pointwise import TritonKernels  # not everywhere is there a Triton to import

    return TritonKernels()


def is_listened_to(module: nn.Module) -> bool:
    """Whether somebody waits for its inputs or outputs, or has given it a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


def _is_fused_for(x: Tensor) -> bool:
    return (
        torch.is_grad_enabled()  # else there are the strips
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type in ("cpu", "cuda")
        and x.dtype != torch.float64  # sums are in float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and (x.is_cuda or x.numel() >= WORTH_COMPILING)
        and has_compiler(x.device.type)
    )


def _can_fuse(norm: nn.GroupNorm, activation: nn.Module) -> bool:
    listened = is_listened_to(norm) or is_listened_to(activation)
    return type(norm) is nn.GroupNorm and type(activation) is nn.SiLU and not listened


class _NormSiLU(torch.autograd.Function):
    """SiLU(layer(x)); once differentiable by its own formulas (`Kernels.gradients`), by torch's from then on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: nn.GroupNorm) -> Tensor:
        kernels, rows = fastest(x.device.type), x.detach().permute(0, 2, 3, 1)  # [B, H, W, C]
        moments = kernels.moments()
        moments.add(rows)
        norm = moments.norm(layer, F.silu)
        y = torch.empty_like(rows)
        kernels.normalise_(y.flatten(1, 2), rows.flatten(1, 2), norm)
        ctx.save_for_backward(x, weight, bias)
        ctx.layer, ctx.known = layer, (norm, moments.mean, moments.inverse)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # since a gradient of this gradient will be asked for
            y = F.silu(F.group_norm(x, ctx.layer.num_groups, weight, bias, ctx.layer.eps))
            wanted = [value for value in (x, weight, bias) if value.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(found) if value.requires_grad else None for value in (x, weight, bias)), None
        rows, dy = x.detach().permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1).contiguous()
        dx, dweight, dbias = fastest(x.device.type).gradients(dy, rows, weight, *ctx.known)
        return dx.permute(0, 3, 1, 2), dweight, dbias, None
