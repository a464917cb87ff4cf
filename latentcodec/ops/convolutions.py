"""Convolutions of strips, with weights that are made ready once: folded, cast and, on CPUs, packed for oneDNN.

A strip comes as a window [B, rows, W, C], channels last, that already holds the rows around it; only columns are
padded here. Packing moves weights about, and folding adds them: the results are those of `torch.nn.functional`, but for
the bias and a residual, which oneDNN adds before it rounds: a mean that a bias cancels would cost bfloat16 its digits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from latentcodec.ops.pointwise import Moments

log = logging.getLogger(__name__)

Convolution = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""[B, C, rows, W], a bias [C'] and a residual [B, C', rows', W'], added where they are given -> [B, C', rows', W']."""
WindowConvolution = Callable[..., Tensor]
"""[B, rows, W, C], moments that count the result in, and a residual [B, rows', W', C'] -> [B, rows', W', C']."""

PROBES = 4096  # values of a weight that are looked at to see whether it has changed

_prepared = WeakTensorKeyDictionary()
"""weight -> (its state, the prepared convolution)."""


def window_convolution(
    weight: Tensor, bias: Tensor | None, stride: int, columns: int, dtype: torch.dtype
) -> WindowConvolution:
    """A convolution of windows of `dtype`: [B, rows, W, C] -> [B, rows', W', C'].

    weight [C', C, k, k] and bias [C'] as a layer holds them; `columns` zeros are padded left and right.
    """
    prepare = partial(_prepare_direct, stride=stride, columns=columns)
    return _window_convolution(weight, bias, dtype, prepare)


def window_upsample_convolution(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> WindowConvolution:
    """Nearest neighbour times two, then the 3x3 convolution: [B, r + 2, W, C] -> [B, 2r, 2W, C'].

    A pixel of the doubled map sees only 2x2 different pixels of the map, so the nine taps add up to four, others for
    each parity of row and column: the taps of one transposed convolution of size 4 and stride 2. That is 4/9 of the
    multiplications and no doubled map; exact at the borders too, where zeros double to zeros.
    """
    return _window_convolution(weight, bias, dtype, _prepare_upsample)


def _window_convolution(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    prepare: Callable[[Tensor, torch.dtype], Convolution],
) -> WindowConvolution:
    run = _prepared_convolution(weight, dtype, prepare)
    assert bias is not None  # every convolution of an AutoencoderKL has one
    bias = bias.to(dtype)

    def convolve(window: Tensor, moments: Moments | None = None, residual: Tensor | None = None) -> Tensor:
        x = window.permute(0, 3, 1, 2)
        if moments is not None and moments.fuses_bias_and_residual:
            y = run(x, None, None).permute(0, 2, 3, 1).contiguous()
            moments.add(y, bias, residual)
            return y
        added = None if residual is None else residual.permute(0, 3, 1, 2)
        y = run(x, bias, added).permute(0, 2, 3, 1).contiguous()
        if moments is not None:
            moments.add(y)
        return y

    return convolve


def _prepared_convolution(
    weight: Tensor, dtype: torch.dtype, prepare: Callable[[Tensor, torch.dtype], Convolution]
) -> Convolution:
    """The prepared convolution; on a CPU the one prepared earlier, unless the weight has changed since."""
    values = weight.detach()
    if weight.device.type != "cpu":  # where there is no packing
        return prepare(values, dtype)
    version = 0 if weight.is_inference() else weight._version
    state = weight.data_ptr(), version, _probe(values), dtype
    known, run = _prepared.get(weight, (None, None))
    if run is None or known != state:
        run = prepare(values, dtype)
        _prepared[weight] = state, run
    return run


def _probe(weight: Tensor) -> float:
    """A sum over values from all over [C', C, k, k], since adapters write to `.data`, which counts no version.

    The step through the memory has no factor in common with C k k, so every tap and every channel has its turn.
    """
    step = max(1, weight.numel() // PROBES)
    while math.gcd(step, weight[0].numel()) > 1:
        step += 1
    memory = weight.as_strided((weight.numel(),), (1,))  # of either layout, without a copy
    return memory[::step].double().sum().item()


def _prepare_direct(weight: Tensor, dtype: torch.dtype, stride: int, columns: int) -> Convolution:
    weight = weight.to(dtype, memory_format=torch.channels_last)
    if weight.device.type == "cuda" and weight.shape[2:] == (1, 1) and stride == 1:
        return partial(_pointwise, weight[:, :, 0, 0])
    if not _packs(weight.device.type, dtype):
        return lambda x, bias, added: _plus(F.conv2d(x, weight, bias, stride, (0, columns)), added)
    return _packed_direct(weight, stride, columns)


def _prepare_upsample(weight: Tensor, dtype: torch.dtype) -> Convolution:
    exact = torch.promote_types(weight.dtype, dtype)
    ready = fold_upsample_weight(weight.to(exact)).to(dtype, memory_format=torch.channels_last)
    if not _packs(ready.device.type, dtype):
        return lambda x, bias, added: _plus(F.conv_transpose2d(x, ready, bias, 2, (3, 1)), added)
    return _packed_upsample(ready)


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
        axis = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
        return torch.kron(axis, axis).to(device, dtype)


def _pointwise(weight: Tensor, x: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
    """A 1x1 convolution as the matrix product it is: on GPUs cuBLAS adds the bias, where cuDNN leaves another pass."""
    return _plus(F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2), added)


def _plus(result: Tensor, added: Tensor | None) -> Tensor:
    return result if added is None else result.add_(added)


# --- oneDNN


def _packed_direct(weight: Tensor, stride: int, columns: int) -> Convolution:
    shape: Any = [0, columns], [stride, stride], [1, 1], 1  # padding, stride, dilation, groups
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *shape)
    run = torch.ops.mkldnn._convolution_pointwise

    def convolve(x: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
        if added is None:
            return run(x, packed, bias, *shape, "none", [], "")
        return run.binary(x, added, packed, bias, *shape, "add", 1.0, None, [], None)

    return convolve


def _packed_upsample(weight: Tensor) -> Convolution:
    shape: Any = [3, 1], [0, 0], [2, 2], [1, 1], 1  # padding, output padding, stride, dilation, groups
    packed = torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, *shape)
    run = torch.ops.mkldnn._convolution_transpose_pointwise
    return lambda x, bias, added: _plus(run(x, packed, bias, *shape, "none", [], ""), added)


@cache
def _packs(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this torch packs weights as we ask it to, and then gives what plain convolutions give.

    The operators are those of inductor's frozen graphs and no public interface, and oneDNN has had wrong results
    for small bfloat16 kernels (pytorch #163347): so each is tried before it is trusted.
    """
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, direct, doubling, bias, added = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((1, 32, 6, 7), (48, 32, 3, 3), (32, 48, 4, 4), (48,), (1, 48, 4, 7))
    )
    x, direct, doubling, added = (
        value.to(memory_format=torch.channels_last) for value in (x, direct, doubling, added)
    )
    try:
        pairs = (
            (_packed_direct(direct, 1, 1)(x, bias, None), F.conv2d(x, direct, bias, 1, (0, 1))),
            (_packed_direct(direct, 1, 1)(x, bias, added), F.conv2d(x, direct, bias, 1, (0, 1)) + added),
            (_packed_upsample(doubling)(x, bias, None), F.conv_transpose2d(x, doubling, bias, 2, (3, 1))),
        )
    except (AttributeError, RuntimeError) as error:
        log.warning("this torch does not pack %s weights, and convolutions are slower: %s", dtype, error)
        return False
    tolerance = 1e-5 + 2 * torch.finfo(dtype).eps  # of the largest value: sums in another order, rounded once
    if all((ours - plain).abs().max() <= tolerance * plain.abs().max() for ours, plain in pairs):
        return True
    log.warning("this torch packs %s weights wrongly, so they are left as they are: slower", dtype)
    return False
