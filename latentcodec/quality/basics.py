"""What needs no training: gradients through a draw, squared error as a likelihood, how many numbers a gaussian has.

Each is computed, not asserted, so that a page can show the numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributions import Normal

DIMENSIONS = (2, 16, 128)


def measure_all() -> dict[str, Any]:
    """E0 of the classic experiments."""
    return {"gradients": gradients(), "likelihood": likelihood(), "numbers": numbers_of_a_gaussian()}


def gradients() -> dict[str, float | None]:
    """The gradient of sum (z^2) with respect to a mean of 0.5, where z is drawn in two ways; None: there is none."""
    found: dict[str, float | None] = {}
    for name in ("sample", "mean + sigma * noise"):
        mean, sigma = torch.tensor(0.5, requires_grad=True), torch.tensor(0.2)
        noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        z = mean + sigma * noise if name != "sample" else Normal(mean, sigma).sample((1000,))
        loss = z.square().mean()
        if loss.requires_grad:
            loss.backward()
        found[name] = None if mean.grad is None else mean.grad.item()
    return found


def likelihood() -> dict[str, float]:
    """Squared error against the negative log-likelihood of a gaussian: their gradients, in the same units."""
    generator = torch.Generator().manual_seed(0)
    x, start = (torch.rand(28, 28, generator=generator) for _ in range(2))
    sigma, grads = 0.7, []
    for negative in (False, True):
        y = start.clone().requires_grad_()
        loss = -Normal(y, sigma).log_prob(x).sum() if negative else (x - y).square().sum() / (2 * sigma**2)
        loss.backward()
        assert y.grad is not None
        grads.append(y.grad)
    error, exact = grads
    return {"largest_difference": (error - exact).abs().max().item(), "largest": exact.abs().max().item()}


def numbers_of_a_gaussian() -> dict[str, dict[str, int]]:
    """How many numbers an encoder must put out: with a diagonal covariance, and with a whole one."""
    return {str(d): {"diagonal": 2 * d, "whole": d + len(torch.tril_indices(d, d)[0])} for d in DIMENSIONS}
