"""Muon: AdamW whose steps for the convolutions between feature maps are orthogonal matrices.

AdamW looks at every weight alone. A convolution is a linear map, and what counts is how far a step can move its
output: the largest singular value of the step. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) gives all
singular values of a step the same size, so that weak directions of the gradient move as far as strong ones. Bernstein
and Newhouse 2024 (arXiv:2409.20325) derive it as the steepest descent under the spectral norm.

Shapes: C channels in, C' channels out, k kernel size, G weights of one shape.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

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
            # Weights of one shape move together: a GPU would idle between small steps.
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"] if group["orthogonal"] else ():
                if weight.grad is not None:
                    alike[weight.shape].append(weight)
            for weights in alike.values():
                self._move(weights, group["lr"], group["weight_decay"])
        super().step()
        return loss

    def _move(self, weights: list[Tensor], lr: float, decay: float) -> None:
        """One step of G weights of one shape, whose gradients are dropped: AdamW's own step passes over them."""
        gradients = [cast(Tensor, weight.grad) for weight in weights]
        averages = [self._average(weight) for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - MOMENTUM)
        directions = torch.stack(torch._foreach_lerp(gradients, averages, MOMENTUM))  # [G, C', C, k, k]
        # Columns in the order of channels-last memory, in which a kernel is a matrix without a copy.
        kernels = directions.ndim == 5
        columns_last = directions.permute(0, 1, 3, 4, 2) if kernels else directions
        steps = orthogonal(columns_last.flatten(2)).view_as(columns_last)
        steps = steps.permute(0, 1, 4, 2, 3) if kernels else steps
        tallness = len(weights[0]) / weights[0][0].numel()
        torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_sub_(weights, steps.unbind(), alpha=lr * math.sqrt(max(1, tallness)))
        for weight in weights:
            weight.grad = None

    def _average(self, weight: Tensor) -> Tensor:
        """The averaged gradient, under the names that AdamW gives to its own, with this step counted."""
        state = self.state[weight]
        if not state:
            state["step"], state["exp_avg"] = torch.tensor(0.0), torch.zeros_like(weight)
        state["step"] += 1
        return cast(Tensor, state["exp_avg"])


def orthogonal(matrices: Tensor) -> Tensor:
    """U V^T of each of [..., m, n] = U S V^T, up to singular values between 0.7 and 1.2 where the relative ones
    exceed 0.01.

    Newton and Schulz's iteration X <- p(X X^T) X with p(s) = a + b s + c s^2. X X^T and its polynomials commute, so
    the rounds need only the Gram matrix: 4 m^2 n operations in all and 8 m^3 a round, for m rows and n columns, m <= n.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonal(matrices.mT).mT
    a, b, c = QUINTIC
    # The squares of a norm underflow where averages have faded below 1e-23, so the largest element is made 1 first.
    tiny = torch.finfo(matrices.dtype).tiny
    matrices = matrices / matrices.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    matrices = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(tiny)
    gram = matrices @ matrices.mT
    product = identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for _ in range(ROUNDS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ matrices
