"""Muon: AdamW whose steps for the convolutions between feature maps are orthogonal matrices.

AdamW looks at every weight alone. A convolution is a linear map, and what counts is how far a step can move its
output: the largest singular value of the step. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) gives all
singular values of a step the same size, so that weak directions of the gradient move as far as strong ones. Bernstein
and Newhouse 2024 (arXiv:2409.20325) derive it as the steepest descent under the spectral norm.

Shapes: C channels in, C' channels out, k kernel size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95  # Jordan's, with Nesterov's look ahead
# Jordan's quintic a x + b x^3 + c x^5: five rounds bring singular values between 0.01 and 1 to between 0.7 and 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(torch.optim.AdamW):
    """AdamW, and in groups with "orthogonal" set, of matrices and kernels [C', C, k, k], orthogonal steps.

    There the weight W as a matrix [C', C k k] moves by -lr sqrt(max(1, C' / C k k)) O, with O the orthogonal factor of
    the averaged gradient, after the same decay as in AdamW. A step is computed in float32, so that processes whose
    gradients agree to rounding take steps that agree to rounding.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of every group; gradients that made orthogonal steps are dropped. Returns the closure's loss."""
        # A closure makes the gradients of all groups, so it comes before the first of them moves.
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for weight in group["params"] if group["orthogonal"] else ():
                if weight.grad is not None:
                    self._move(weight, weight.grad, group["lr"], group["weight_decay"])
                    weight.grad = None  # which AdamW's own step passes over
        super().step()
        return loss

    def _move(self, weight: nn.Parameter, gradient: Tensor, lr: float, decay: float) -> None:
        state = self.state[weight]
        if not state:  # under the names that AdamW gives to its own
            state["step"], state["exp_avg"] = torch.tensor(0.0), torch.zeros_like(weight)
        state["step"] += 1
        average = state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
        direction = gradient.lerp(average, MOMENTUM)
        # Columns in the order of channels-last memory, in which a kernel is a matrix without a copy.
        columns_last = direction.permute(0, 2, 3, 1) if direction.ndim == 4 else direction
        step = orthogonal(columns_last.flatten(1)).view_as(columns_last)
        step = step.permute(0, 3, 1, 2) if direction.ndim == 4 else step
        tallness = len(direction) / direction[0].numel()
        weight.mul_(1 - lr * decay).sub_(step, alpha=lr * math.sqrt(max(1, tallness)))


def orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of matrix = U S V^T, up to singular values between 0.7 and 1.2 where the relative ones exceed 0.01.

    Newton and Schulz's iteration X <- p(X X^T) X with p(s) = a + b s + c s^2. X X^T and its polynomials commute, so
    the rounds need only the Gram matrix: 4 m^2 n operations in all and 8 m^3 a round, for m rows and n columns, m <= n.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    a, b, c = QUINTIC
    # The squares of a norm underflow where averages have faded below 1e-23, so the largest element is made 1 first.
    tiny = torch.finfo(matrix.dtype).tiny
    matrix = matrix / matrix.abs().amax().clamp_min(tiny)
    matrix = matrix / matrix.norm().clamp_min(tiny)
    gram = matrix @ matrix.T
    product = identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(ROUNDS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ matrix
