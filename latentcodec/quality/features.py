"""Frechet distances between sets of pictures, in features that are named: none of them is Inception, so none is FID.

Shapes: N images, C channels, H W pixels, D features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Features = Callable[[Tensor], Tensor]
"""[N, C, H, W] in [-1, 1] -> [N, D] float64."""
BATCH = 32
SCALES = 4


def pixel_statistics(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, 4 * 4 * C]: mean, deviation and mean size of both gradients, at four scales.

    Needs no weights: enough to tell a codec's samples from noise, too little to judge what is drawn.
    """
    found = []
    for _ in range(SCALES):
        across, down = (x.diff(dim=dim).abs().mean((2, 3)) for dim in (3, 2))
        found += [x.mean((2, 3)), x.std((2, 3)), across, down]
        if min(x.shape[-2:]) >= 4:
            x = F.avg_pool2d(x, 2)
    return torch.cat(found, 1).double()


def network_features(network: nn.Module) -> Features:
    """The mean of each channel of each stage of an LPIPS network (see `perceptual.load_lpips`)."""

    @torch.inference_mode()
    def features(x: Tensor) -> Tensor:
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
        stages = network.net(network.scaling_layer(x))  # type: ignore[operator]
        return torch.cat([stage.mean((2, 3)) for stage in stages], 1).double()

    return features


def features_of_all(features: Features, images: Tensor) -> Tensor:
    """`features` of [N, C, H, W], batch by batch."""
    return torch.cat([features(part) for part in images.split(BATCH)])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Of two sets of features [N, D], [M, D]: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)), in percent of b's variance tr B.

    Dowson and Landau 1982. The root's trace is taken from the singular values of A^(1/2) B^(1/2), which are never
    complex. With fewer samples than features it is too large, for all sides alike.
    """
    roots = [_root(torch.cov(side.T)) for side in (a, b)]
    spread = sum(root.square().sum() for root in roots)
    common = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return (100 * (shift + spread - 2 * common) / roots[1].square().sum()).item()


def gaussian_like(z: Tensor, count: int, seed: int) -> Tensor:
    """[count, c, h, w]: draws of the Gaussian with the mean and the covariance of z [N, c, h, w], cells and channels.

    A draw is a random combination of the centred samples, which has exactly their covariance, however large it is.
    """
    generator = torch.Generator().manual_seed(seed)
    centred = (z - z.mean(0)).flatten(1)
    weights = torch.randn(count, len(z), generator=generator).to(z) / max(len(z) - 1, 1) ** 0.5
    return z.mean(0) + (weights @ centred).unflatten(1, z.shape[1:])


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
