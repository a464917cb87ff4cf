"""The 3x3 convolution that predicts one map from another best, in closed form.

Shapes: B batch, H W positions, n channels of the map that is given, m of the one that is predicted.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Of the least squares, relative to the mean energy of the regressors. As large as it can be without a loss (0.2 dB):
# a solution of small weights still holds when the first training steps move the features below it.
RIDGE = 1e-2
ENOUGH_POSITIONS = 2**16  # for the hundreds of unknowns of one least squares problem


def least_squares(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The 3x3 convolution that predicts `target` from `h` best: weight [m, n, 3, 3] and bias [m].

    h [B, n, H, W], target [B, m, H, W]; zero padding as the layer has it.
    """
    gram, products = _normal_equations(F.pad(h, (1, 1, 1, 1)), 3, target)
    return _solved(gram, products, h.shape[1])


def least_squares_doubled(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same for the map that is `h` doubled by nearest neighbours: h [B, n, H, W], target [B, m, 2H, 2W].

    The rows of a 3x3 window around an even row of the doubled map are the rows i - 1, i, i of h, and around an odd one
    i, i, i + 1. So each of the four kinds of position sees 2x2 values of h, and its normal equations in those give the
    ones in the nine taps: with a fifth of the multiplications.
    """
    n, m = h.shape[1], target.shape[1]
    gram = torch.zeros(9 * n + 1, 9 * n + 1, dtype=torch.float64)
    products = torch.zeros(9 * n + 1, m, dtype=torch.float64)
    copied = torch.tensor([[0, 1, 1], [0, 0, 1]])  # [parity, tap]: the row, or column, that a tap reads
    channels = 4 * torch.arange(n)[:, None, None]
    for a, b in itertools.product(range(2), repeat=2):
        window = F.pad(h, (1 - b, b, 1 - a, a))
        small, small_products = _normal_equations(window, 2, target[:, :, a::2, b::2])
        taps = channels + 2 * copied[a][:, None] + copied[b]  # [n, 3, 3]: the unknown of the small equations
        reads = torch.cat([taps.flatten(), torch.tensor([4 * n])])  # and the bias
        gram += small[reads[:, None], reads]
        products += small_products[reads]
    return _solved(gram, products, n)


def _normal_equations(h: Tensor, side: int, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all positions of the products of a window's k = n side^2 values and a 1 with one another, [k+1, k+1],
    and with `target` [B, m, H, W]: [k+1, m]; h [B, n, H + side - 1, W + side - 1]; float64.

    Of large maps only every third, fifth, ... row and column counts: neighbours say nearly the same. The step is odd,
    since maps that were doubled before differ between even and odd rows, and all of them must count.
    """
    k = h.shape[1] * side**2
    step = math.ceil(math.sqrt(target.shape[0] * target.shape[2] * target.shape[3] / ENOUGH_POSITIONS)) | 1
    gram = torch.zeros(k + 1, k + 1, dtype=torch.float64)
    products = torch.zeros(k + 1, target.shape[1], dtype=torch.float64)
    for h_part, target_part in zip(h.split(8), target.split(8), strict=True):
        rows = rearrange(F.unfold(h_part, side, stride=step), "b k p -> (b p) k")
        rows = F.pad(rows, (0, 1), value=1.0)  # the bias
        gram += (rows.T @ rows).double()
        products += (rows.T @ rearrange(target_part[:, :, ::step, ::step], "b m h w -> (b h w) m")).double()
    return gram, products


def _solved(gram: Tensor, products: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Weight [m, n, 3, 3] and bias [m] of normal equations, with a small ridge."""
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram, products).float()
    return rearrange(solution[:-1], "(n i j) m -> m n i j", i=3, j=3), solution[-1]
