"""Direct convolutions of float32 maps on CPUs in native code (`convolution.cpp`), and the memory of a pass.

Shapes: B batch, H W rows and columns, C channels, O output channels, k taps along an axis. Maps are [B, H, W, C].
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from latentcodec.ops.native.build import PRODUCTS_A_VALUE, floats, threads_for
from latentcodec.ops.onednn import Convolution

PANEL = 16  # outputs that are summed up at a time
ROWS = 14  # results that are, at most: memory is for whole ones
MOST_TAPS = 1152  # k k C, above which oneDNN's convolution is faster
MOST_RESULTS = 1 << 15  # of a call, likewise
TOGETHER = 48  # results whose pixels a thread lays side by side


class Workspace:
    """Memory that the convolutions of one pass use again and again: fresh memory costs as much as the transforms."""

    def __init__(self, records: bool = False) -> None:
        self.records = records
        self.values = floats(0)
        self.weights: list[Tensor] = []  # that no convolution holds now
        self.convolutions: list[NativeConvolution] = []  # of a recording: their weights stay where they are

    def memory(self, size: int) -> Tensor:
        """At least `size` float32 values, the same at each call."""
        if self.values.numel() < size:
            self.values = floats(size)
        return self.values

    def borrow_weight(self, size: int) -> Tensor:
        """`size` float32 values, to be given back into `weights`."""
        memory = self.weights.pop() if self.weights else floats(0)
        return memory if memory.numel() >= size else floats(size)

    def forget_weights(self) -> None:
        """Free what was given back."""
        self.weights.clear()


class NativeConvolution:
    """A convolution with native code for some shapes, and another one, prepared when it is first needed, for others."""

    def __init__(self, library: ctypes.CDLL, prepare_other: Callable[[], Convolution]) -> None:
        self.library, self.prepare_other = library, prepare_other
        self.other: Convolution | None = None

    def by_other_means(self, window: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if self.other is None:
            self.other = self.prepare_other()
        return self.other(window, bias, residual)

    def using(self, workspace: Workspace) -> Convolution:
        """As it runs in one pass."""
        raise NotImplementedError


class DirectConvolution(NativeConvolution):
    """A convolution of windows [B, H, W, C] with a weight [O, C, k, k], `columns` zeros left and right of them."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        stride: int,
        columns: int,
        prepare_other: Callable[[], Convolution],
    ) -> None:
        super().__init__(library, prepare_other)
        self.stride, self.columns = stride, columns
        self.outputs, self.channels, self.size, _ = weight.shape
        packed = weight.float().permute(2, 3, 1, 0).reshape(-1, self.outputs)
        packed = F.pad(packed, (0, -self.outputs % PANEL))
        self.packed = (
            packed.unflatten(1, (-1, PANEL)).transpose(0, 1).contiguous()
        )  # [O / PANEL, k k C, PANEL]

    def using(self, workspace: Workspace) -> Convolution:
        return _RunningDirect(self, workspace)


class _RunningDirect:
    """A `DirectConvolution` during one pass."""

    def __init__(self, convolution: DirectConvolution, workspace: Workspace) -> None:
        self.convolution, self.workspace = convolution, workspace

    def __call__(self, window: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        made = self.convolution
        window = window if window.is_contiguous() else window.contiguous()
        images, rows, columns, channels = window.shape
        size, stride = made.size, made.stride
        shape = (rows - size) // stride + 1, (columns + 2 * made.columns - size) // stride + 1, made.outputs
        results = images * shape[0] * shape[1]
        if results > MOST_RESULTS:
            return made.by_other_means(window, bias, residual)
        threads = threads_for(results * made.packed.numel() / PRODUCTS_A_VALUE)
        together = min(TOGETHER, -(-results // threads))
        own = (together + ROWS) * (size**2 * channels + made.packed.shape[0] * PANEL)
        memory, y = self.workspace.memory(threads * own), floats(images, *shape)
        made.library.convolve(
            *(y.data_ptr(), window.data_ptr(), *window.stride()[:2], *window.shape, *shape),
            *(size, stride, made.columns, made.packed.data_ptr(), None if bias is None else bias.data_ptr()),
            *((None, 0, 0) if residual is None else (residual.data_ptr(), *residual.stride()[:2])),
            *(together, memory.data_ptr(), threads),
        )
        return y
