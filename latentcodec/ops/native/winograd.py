"""Winograd's convolutions of float32 maps on CPUs (`winograd.cpp`), with a bias and a residual added.

F(4x4, 3x3) takes a quarter of the multiplications of the direct convolution, F(2x2, 3x3) 4/9; of a map that is doubled
first, 25/144 and 1/4.

Shapes: B batch, r rows of a strip, H W rows and columns, C channels, O output channels, T tiles, P points on an axis.
Maps are [B, H, W, C].
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcodec.ops.native.build import PRODUCTS_A_VALUE, floats, library, threads_for
from latentcodec.ops.native.convolution import PANEL, ROWS, NativeConvolution, Workspace
from latentcodec.ops.onednn import Convolution

MARGIN = 16  # as in winograd.cpp
BLOCK_BYTES = 1 << 20  # of the tiles and products that a thread has in hand
FEW_TILES, MANY_TILES = 18, 96  # for which a weight is read: in the cache, and where they do not fit into it
MIN_TILES = 16  # below which it does not pay to transform a weight
KEPT_VALUES = (
    1 << 18
)  # of a weight whose transform is kept; that of a larger one pays for itself in each pass
LARGEST_ERROR = 1e-5  # of a channel's values on noise, root mean square: direct convolutions have some 2e-7
CHANNELS_TRIED = 32  # of the output, those with the most uneven weights


@dataclass(frozen=True)
class Scheme:
    """Which transforms: `outputs` on each side of a tile, 4 or 2, of a map that is doubled first or not.

    Or the result of F(4x4, 3x3) is halved, by sums of 2 x 2: so goes the gradient through a map that was doubled.
    """

    outputs: int
    doubles: bool = False
    halves: bool = False

    @property
    def products(self) -> int:
        """P^2: multiplications for each tile and pair of channels."""
        return (self.outputs + 2 - (self.doubles or self.halves)) ** 2

    @property
    def times(self) -> int:
        """How many rows and columns come of one."""
        return 2 if self.doubles else 1

    @property
    def side(self) -> int:
        """Rows that are left of a tile's `outputs`."""
        return self.outputs // 2 if self.halves else self.outputs

    @property
    def resizing(self) -> int:
        """As the native functions are told of it."""
        return 2 if self.halves else int(self.doubles)

    def __str__(self) -> str:
        return f"F({self.outputs}x{self.outputs}, 3x3)" + (" of a doubled map" if self.doubles else "")


PLAIN = Scheme(4)
"""What training takes for maps that keep their size."""


class WinogradConvolution(NativeConvolution):
    """A 3x3 convolution of windows [B, r + 2, W, C]: Winograd's where there are tiles enough, else the direct one."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        scheme: Scheme,
        direct: Callable[[], Convolution],
        keep: bool = True,
    ) -> None:
        super().__init__(library, direct)
        self.weight, self.scheme = weight, scheme
        self.error = 0.0  # as `best` measured it
        keep = keep and weight.numel() <= KEPT_VALUES
        self.kept = self.transformed(floats(self.size)) if keep else None

    @classmethod
    def best(
        cls, weight: Tensor, doubles: bool, direct: Callable[[], Convolution], keep: bool = True
    ) -> WinogradConvolution | None:
        """With the fewest multiplications among those that are exact enough for this weight [O, C, 3, 3]."""
        native = library()
        if native is None or weight.shape[0] % PANEL or weight.shape[1] % PANEL:
            return None
        for scheme in (Scheme(4, doubles), Scheme(2, doubles)):
            if (found := error(native, weight.float(), scheme)) <= LARGEST_ERROR:
                made = cls(native, weight, scheme, direct, keep)
                made.error = found
                return made
        return None

    @property
    def size(self) -> int:
        """Values of the transformed weight."""
        return weight_values(self.scheme, *self.weight.shape[:2])

    def transformed(self, memory: Tensor) -> Tensor:
        """The weight's transform, in `memory`."""
        return transform_weight_(memory, self.library, self.weight.float(), self.scheme)

    def using(self, workspace: Workspace) -> Convolution:
        """As it runs in one pass."""
        return _Running(self, workspace)


class _Running:
    """A `WinogradConvolution` during one pass, which holds memory for its weight as long as it is alive."""

    def __init__(self, convolution: WinogradConvolution, workspace: Workspace) -> None:
        self.convolution, self.workspace = convolution, workspace
        self.weight = convolution.kept
        self.memory: Tensor | None = None

    def __call__(self, window: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        prepared = self.convolution
        images, rows, columns, _ = window.shape
        area = images * (rows - 2) * columns * prepared.scheme.times**2
        if self.weight is None:
            if area < MIN_TILES * prepared.scheme.outputs**2:
                return prepared.by_other_means(window, bias, residual)
            self.memory = self.workspace.borrow_weight(prepared.size)
            self.weight = prepared.transformed(self.memory)
        return convolve(
            *(prepared.library, window, self.weight, len(prepared.weight), prepared.scheme),
            *(bias, residual, self.workspace),
        )

    def __del__(self) -> None:
        if self.memory is not None:
            self.workspace.weights.append(self.memory)


def suits(weight: Tensor, pixels: int) -> bool:
    """Whether a convolution of maps of so many pixels with a weight [O, C, 3, 3] runs here."""
    outputs, channels = weight.shape[:2]
    return not (outputs % PANEL or channels % PANEL) and pixels >= 16 * MIN_TILES and library() is not None


def whole_map(
    x: Tensor, weight: Tensor, bias: Tensor | None, scheme: Scheme = PLAIN, turns: bool = False
) -> Tensor:
    """The convolution of x [B, C, H, W] in channels_last, zeros around it, resized as the scheme says -> the same.

    `turns` takes weight [C, O, 3, 3] with the taps in reverse order: so gradients go back through a convolution.
    """
    native = library()
    assert native is not None
    weight = weight.transpose(0, 1) if turns else weight
    transformed = floats(weight_values(scheme, *weight.shape[:2]))
    transform_weight_(transformed, native, weight, scheme, turns)
    rows = x.permute(0, 2, 3, 1)
    given = None if bias is None else bias.contiguous()
    y = convolve(native, rows, transformed, len(weight), scheme, given, None, Workspace(), pads_rows=True)
    return y.permute(0, 3, 1, 2)


def error(library: ctypes.CDLL, weight: Tensor, scheme: Scheme) -> float:
    """The largest error of an output channel on noise, root mean square, relative to the channel's values.

    Compared with the direct convolution in float32, for channels whose weights are the most uneven.
    """
    flat = weight.flatten(1)
    unevenness = flat.abs().amax(1) / flat.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    weight = weight[unevenness.topk(min(CHANNELS_TRIED, len(weight))).indices]
    made = scheme.outputs // scheme.times
    generator = torch.Generator("cpu").manual_seed(0)
    noise = floats(1, made + 2, 4 * made, weight.shape[1]).normal_(generator=generator)
    window = F.silu(noise)
    transformed = floats(weight_values(scheme, *weight.shape[:2]))
    transform_weight_(transformed, library, weight, scheme)
    ours = convolve(library, window, transformed, len(weight), scheme, None, None, Workspace())
    map_ = F.interpolate(window.permute(0, 3, 1, 2), scale_factor=float(scheme.times))
    edge = scheme.times - 1  # rows of a doubled map that only the neighbours' tiles see
    exact = F.conv2d(map_[:, :, edge : map_.shape[2] - edge], weight, None, 1, (0, 1)).permute(0, 2, 3, 1)
    channels = (0, 1, 2)
    deviation = (ours - exact).square().mean(channels).sqrt()
    return (deviation / exact.square().mean(channels).sqrt().clamp_min(1e-30)).max().item()


def transform_weight_(
    out: Tensor, library: ctypes.CDLL, weight: Tensor, scheme: Scheme, turns: bool = False
) -> Tensor:
    """out [`weight_values`] <- G w G^T of weight [O, C, 3, 3], which may have any strides, its taps in reverse order
    where it `turns`."""
    first, (*planes, row, column) = weight.data_ptr(), weight.stride()
    if turns:  # read from the last tap on: no copy
        first, row, column = first + weight.itemsize * 2 * (row + column), -row, -column
    library.winograd_weight(
        *(scheme.outputs, scheme.resizing, out.data_ptr(), first, *weight.shape[:2]),
        *(*planes, row, column, torch.get_num_threads()),
    )
    return out


def convolve(
    library: ctypes.CDLL,
    x: Tensor,
    transformed: Tensor,
    outputs: int,
    scheme: Scheme,
    bias: Tensor | None,
    residual: Tensor | None,
    workspace: Workspace,
    pads_rows: bool = False,
) -> Tensor:
    """The 3x3 convolution of x [B, H, W, C] with a weight [O, C, 3, 3] of which `transformed` holds the transform.

    Columns are padded with zeros; rows too where `pads_rows`, else x holds the row above and the row below. ->
    [B, H', W', O] with H' = H or H - 2, and H' and W' as the scheme resizes them; O = `outputs`. bias [O], residual as
    the result.
    """
    images, rows, columns, channels = x.shape
    times, parts = scheme.times, 1 + scheme.halves
    made = images, (rows if pads_rows else rows - 2) * times // parts, columns * times // parts, outputs
    tiles = images * -(-made[1] // scheme.side) * -(-made[2] // scheme.side)
    threads = threads_for(
        tiles * scheme.products * (channels * outputs / PRODUCTS_A_VALUE + channels + outputs)
    )
    together = tiles_together(scheme, tiles, channels, outputs, threads)
    memory = workspace.memory(threads * block_values(scheme, together, channels, outputs))
    x, y = x if x.is_contiguous() else x.contiguous(), floats(*made)
    no_residual = None, 0, 0
    library.winograd_convolve(
        *(scheme.outputs, scheme.resizing, y.data_ptr(), x.data_ptr(), x.stride(0), x.stride(1)),
        *(*x.shape, *made[1:], transformed.data_ptr(), None if bias is None else bias.data_ptr()),
        *(no_residual if residual is None else (residual.data_ptr(), *residual.stride()[:2])),
        *(int(pads_rows), together, memory.data_ptr(), threads),
    )
    return y


def tiles_together(scheme: Scheme, tiles: int, channels: int, outputs: int, threads: int) -> int:
    """How many tiles a thread transforms before it multiplies them, equally many for all.

    As many as the cache holds; where these are too few to read a weight for, that does not matter any more.
    """
    most = BLOCK_BYTES // (4 * scheme.products * (channels + outputs))
    most = MANY_TILES if most < FEW_TILES else min(most, MANY_TILES // 2)
    blocks = -(-tiles // (most * threads)) * threads
    return -(-tiles // blocks)


def block_values(scheme: Scheme, together: int, channels: int, outputs: int) -> int:
    """Of the memory of one thread."""
    return scheme.products * ((together + ROWS) * (channels + outputs) + 2 * MARGIN) + channels


def spare_bytes(weight: Tensor) -> int:
    """What the memory of all threads is larger than the tiles and products of a strip, for a weight [O, C, k, k]."""
    outputs, channels = weight.shape[:2]
    return 4 * torch.get_num_threads() * block_values(Scheme(4), 0, channels, outputs)


def weight_values(scheme: Scheme, outputs: int, channels: int) -> int:
    """Of a transformed weight [outputs, channels, 3, 3]."""
    return scheme.products * (outputs * channels + MARGIN)
