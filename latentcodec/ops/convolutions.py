"""Convolutions of strips: the fastest form for a layer's shape and the device, with its weight made ready once.

A strip comes as a window [B, rows, W, C], channels last, that already holds the rows around it; only columns are
padded here. On CPUs a 3x3 convolution in float32 runs as Winograd's (`native/winograd.py`) where it is wide enough, a
1x1 one as a matrix product, and the others through oneDNN with packed weights (`onednn.py`). The results are those of
`torch.nn.functional` up to rounding; bias and residual are added before it, since a mean that a bias cancels would cost
bfloat16 its digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcodec.ops.native.build import library
from latentcodec.ops.native.convolution import MOST_TAPS, DirectConvolution, NativeConvolution, Workspace
from latentcodec.ops.native.winograd import KEPT_VALUES, Scheme, WinogradConvolution, weight_values
from latentcodec.ops.onednn import (
    Convolution,
    packed_convolution,
    packed_upsample_convolution,
    packs_correctly,
)
from latentcodec.ops.pointwise import Moments

WindowConvolution = Callable[..., Tensor]
"""[B, rows, W, C], moments that count the result in, and a residual [B, rows', W', C'] -> [B, rows', W', C']."""

Prepared = Convolution | NativeConvolution

PROBES = 1024  # values of a weight that are looked at to see whether it has changed

_prepared: WeakKeyDictionary[object, tuple[Any, Tensor, Any, Prepared]] = WeakKeyDictionary()
"""owner -> (the state of its weight, the values that are probed, their sum, the prepared convolution). By owners, since
torch refuses to swap (`swap_tensors`) a tensor that somebody refers to weakly."""


def window_convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    columns: int,
    dtype: torch.dtype,
    workspace: Workspace | None = None,
    keep: bool = True,
    owner: object | None = None,
) -> WindowConvolution:
    """A convolution of windows of `dtype`: [B, rows, W, C] -> [B, rows', W', C'].

    weight [C', C, k, k] and bias [C'] as a layer holds them; `columns` zeros are padded left and right. Of a weight
    [C', C, t, k, k] the last of its t taps in time counts: there are only zeros before an image. Winograd's
    convolutions are chosen only where there is a `workspace` for them. What was made of the weight is kept for the next
    call with its `owner`, the layer, unless `keep` is False.
    """
    settings = {"stride": stride, "columns": columns}
    prepare = partial(_prepare_direct, stride=stride, columns=columns)
    return _window_convolution(weight, bias, dtype, prepare, workspace, settings, keep, owner)


def window_upsample_convolution(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    workspace: Workspace | None = None,
    keep: bool = True,
    owner: object | None = None,
) -> WindowConvolution:
    """Nearest neighbour times two, then the 3x3 convolution: [B, r + 2, W, C] -> [B, 2r, 2W, C'].

    A pixel of the doubled map sees only 2x2 different pixels of the map, so the nine taps add up to four, others for
    each parity of row and column: the taps of one transposed convolution of size 4 and stride 2. That is 4/9 of the
    multiplications and no doubled map; exact at the borders too, where zeros double to zeros.
    """
    return _window_convolution(weight, bias, dtype, _prepare_upsample, workspace, {}, keep, owner)


def _window_convolution(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    prepare: Callable[..., Prepared],
    workspace: Workspace | None,
    settings: dict[str, int],
    keep: bool,
    owner: object | None,
) -> WindowConvolution:
    run = _prepared_convolution(weight, dtype, prepare, workspace, settings, keep, owner)
    assert bias is not None  # every convolution of an AutoencoderKL has one
    bias = bias.detach().to(dtype)

    def convolve(window: Tensor, moments: Moments | None = None, residual: Tensor | None = None) -> Tensor:
        if moments is not None and moments.fuses_bias_and_residual:
            y = run(window, None, None).contiguous()
            moments.add(y, bias, residual)
            return y
        y = run(window, bias, residual).contiguous()
        if moments is not None:
            moments.add(y)
        return y

    return convolve


def _prepared_convolution(
    weight: Tensor,
    dtype: torch.dtype,
    prepare: Callable[..., Prepared],
    workspace: Workspace | None,
    settings: dict[str, int],
    keep: bool,
    owner: object | None,
) -> Convolution:
    """The prepared convolution; on a CPU the one prepared earlier, unless the weight has changed since."""
    if weight.device.type != "cpu":  # where there is no packing
        return cast(Convolution, prepare(weight.detach(), dtype))
    version = 0 if weight.is_inference() else weight._version
    state = weight.data_ptr(), weight.stride(), version, dtype, workspace is None, settings
    known = None if owner is None else _prepared.get(owner)
    if known is not None and keep and known[0] == state and known[1].sum().item() == known[2]:
        run = known[3]
    else:
        run = prepare(weight.detach(), dtype, winograd=workspace is not None, keep=keep)
        if owner is not None and keep:
            probed = _probed(weight.detach())
            _prepared[owner] = state, probed, probed.sum().item(), run
        elif known is not None:
            _prepared.pop(owner, None)
    if workspace is not None and isinstance(run, NativeConvolution):
        if workspace.records:
            workspace.convolutions.append(run)
        return run.using(workspace)
    return cast(Convolution, run)


def form_of(owner: object) -> str | None:
    """In which form the convolution of this owner runs on a CPU, and how far that is from the direct one in float32 on
    noise; None where nothing is kept of it."""
    known = _prepared.get(owner)
    if known is None:
        return None
    run = known[-1]
    if isinstance(run, WinogradConvolution):
        return f"{run.scheme}, {run.error:.1e} from the direct convolution"
    return "direct"


def prepared_bytes(weight: Tensor, dtype: torch.dtype, winograd: bool, keep: bool) -> tuple[int, int]:
    """Bytes that stay after a pass for a convolution with this weight, and that are needed while it runs, at most."""
    if weight.device.type != "cpu":
        return 0, weight.numel() * dtype.itemsize
    folded = weight.numel() * (2 if weight.shape[-1] == 3 else 1)  # with room for the taps of a doubled map
    stays = passes = folded * dtype.itemsize
    if winograd and dtype == torch.float32 and weight.shape[2:] == (3, 3):
        transformed = dtype.itemsize * weight_values(Scheme(4), *weight.shape[:2])
        passes += transformed
        stays = max(stays, transformed) if weight.numel() <= KEPT_VALUES else 0
    return (stays, passes) if keep else (0, passes)


def forget_prepared(owner: object) -> None:
    """Let what was made of the weight of a layer go."""
    _prepared.pop(owner, None)


def probing_step(weight: Tensor) -> int:
    """How many values lie between two that are looked at; without a factor in common with C k k, so that every tap and
    every channel has its turn."""
    step = max(1, weight.numel() // PROBES)
    while math.gcd(step, weight[0].numel()) > 1:
        step += 1
    return step


def _probed(weight: Tensor) -> Tensor:
    """A view of values from all over [C', C, k, k], as integers: adapters write to `.data`, which counts no version."""
    step = probing_step(weight)
    memory = weight.as_strided((weight.numel(),), (1,))  # of either layout, without a copy
    return memory.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize])[::step]


def _prepare_direct(
    weight: Tensor, dtype: torch.dtype, stride: int, columns: int, winograd: bool = False, keep: bool = False
) -> Prepared:
    weight = weight if weight.ndim == 4 else weight[:, :, -1]
    direct = partial(_direct, weight, dtype, stride, columns)
    is_suited = winograd and dtype == torch.float32 and stride == columns == 1 and weight.shape[2:] == (3, 3)
    is_native = winograd and dtype == torch.float32 and weight[0].numel() <= MOST_TAPS
    best: Prepared | None = WinogradConvolution.best(weight, False, direct, keep) if is_suited else None
    if best is None and is_native and (native := library()) is not None:
        best = DirectConvolution(native, weight, stride, columns, direct)
    return best or direct()


def _direct(weight: Tensor, dtype: torch.dtype, stride: int, columns: int) -> Convolution:
    is_float = weight.device.type == "cuda" or dtype == torch.float32
    if is_float and weight.shape[2:] == (1, 1) and stride == 1:
        return partial(_pointwise, weight.to(dtype)[:, :, 0, 0])
    weight = weight.to(dtype, memory_format=torch.channels_last)
    if packs_correctly(weight.device.type, dtype):
        return packed_convolution(weight, stride, columns)

    def convolve(window: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return _plus(F.conv2d(window.permute(0, 3, 1, 2), weight, bias, stride, (0, columns)), residual)

    return convolve


def _prepare_upsample(
    weight: Tensor, dtype: torch.dtype, winograd: bool = False, keep: bool = False
) -> Prepared:
    direct = partial(_direct_upsample, weight, dtype)
    is_suited = winograd and dtype == torch.float32 and weight.shape[2:] == (3, 3)
    return WinogradConvolution.best(weight, True, direct, keep) or direct() if is_suited else direct()


def _direct_upsample(weight: Tensor, dtype: torch.dtype) -> Convolution:
    exact = torch.promote_types(weight.dtype, dtype)
    folded = fold_upsample_weight(weight.to(exact)).to(dtype, memory_format=torch.channels_last)
    if packs_correctly(folded.device.type, dtype):
        return packed_upsample_convolution(folded)

    def convolve(window: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return _plus(F.conv_transpose2d(window.permute(0, 3, 1, 2), folded, bias, 2, (3, 1)), residual)

    return convolve


def fold_upsample_weight(weight: Tensor) -> Tensor:
    """[C', C, 3, 3] of a convolution of a doubled map -> [C, C', 4, 4] of the transposed one with stride 2.

    Along an axis, output 2i sees the taps 0; 1 and 2 of rows i - 1; i, and output 2i + 1 the taps 0 and 1; 2 of rows
    i; i + 1. The transposed convolution wants them as the sums 2; 1 and 2; 0 and 1; 0.
    """
    taps = weight.flatten(2) @ _folding(weight.device, weight.dtype)
    return taps.unflatten(2, (4, 4)).transpose(0, 1)


@cache
def _folding(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[9, 16] of zeros and ones: the sums of `fold_upsample_weight`, along both axes."""
    with torch.inference_mode(False):  # fit for autograd, whoever asks for it first
        sums = [[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
        axis = torch.tensor(sums, device=device)
        return torch.kron(axis, axis).to(device, dtype)


def _pointwise(weight: Tensor, window: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """A 1x1 convolution as the matrix product it is: on GPUs cuBLAS adds the bias, where cuDNN leaves another pass."""
    y = F.linear(window, weight, bias)
    return y if residual is None else y.add_(residual)


def _plus(result: Tensor, residual: Tensor | None) -> Tensor:
    """[B, C', r, W] -> [B, r, W, C'], the residual added."""
    y = result.permute(0, 2, 3, 1)
    return y if residual is None else y.add_(residual)
