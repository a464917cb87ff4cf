"""Regularizers on the spectrum of the latent (Ning et al., "Spectrum matching", 2026): pure functions.

The loss is a mean per image, [B]; it is computed in float32: call it outside autocast.

Shapes: B batch, C image channels, H W pixels, c latent channels, h w latent cells. z is the sampled latent as it enters
the decoder, in its raw units.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from latentcodec.ops.cosine import cosine_matrix
from latentcodec.randomness import Purpose, keyed_generator

SPECTRUM_BINS = 16  # radial; Ning et al.
BLOCK = 8  # side of the blocks whose frequencies are masked; Ning et al.
MASKED_DIAGONALS = (0, 8, 10, 12)  # of the 15 of a block; Ning et al.


def spectrum_loss(z: Tensor, x: Tensor, flattening: float) -> Tensor:
    """[B] nats: KL(S_x || S_z), encoding spectrum matching (ESM).

    S is the share of each of 16 radial bins of the two-dimensional cosine transform: the mean power over
    the channels and over the frequencies of a bin, without the constant; the image's times bin^flattening
    (1 is the first bin); then log(1 + power), divided by the sum over the bins. The image is first brought
    to h x w by an antialiased bicubic filter (theirs: a blur and bicubic). The logarithm makes S depend on
    the latent's scale.
    """
    with torch.no_grad():
        small = F.interpolate(x.float(), z.shape[-2:], mode="bicubic", align_corners=False, antialias=True)
        bins = torch.arange(1, SPECTRUM_BINS + 1, device=x.device)
        target = _shares(_radial_power(small) * bins**flattening)
    latent = _shares(_radial_power(z.float()))
    return (target * (torch.log(target + 1e-8) - torch.log(latent + 1e-8))).sum(1)


def _radial_power(t: Tensor) -> Tensor:
    """[B, n, h, w] -> [B, 16]: mean power of the frequencies at a rising distance from the constant."""
    h, w = t.shape[-2:]
    coefficients = cosine_matrix(h).to(t) @ t @ cosine_matrix(w).to(t).T
    power = coefficients.square().mean(1).flatten(1)[:, 1:]  # without the constant, the first of them
    rows, columns = torch.arange(h, device=t.device), torch.arange(w, device=t.device)
    radius = torch.hypot(rows[:, None].float(), columns.float()).flatten()[1:]
    index = (radius / radius.max() * SPECTRUM_BINS).long().clamp(max=SPECTRUM_BINS - 1)
    members = F.one_hot(index, SPECTRUM_BINS).to(power)  # [h w - 1, 16]
    return power @ (members / members.sum(0).clamp(min=1))  # a small latent leaves bins empty


def _shares(power: Tensor) -> Tensor:
    compressed = torch.log1p(power)
    return compressed / (compressed.sum(1, keepdim=True) + 1e-8)


def draw_masked_diagonals(seed: int, step: int) -> int:
    """How many diagonals `mask_spectrum` removes in this optimizer step: 0, 8, 10 or 12."""
    generator = keyed_generator(seed, Purpose.SPECTRUM_MASK, step)
    return MASKED_DIAGONALS[int(torch.randint(len(MASKED_DIAGONALS), (), generator=generator))]


def mask_spectrum(t: Tensor, diagonals: int) -> Tensor:
    """[B, n, h, w] -> the same without the highest frequencies of its 8 x 8 blocks.

    Decoding spectrum matching (DSM): of the cosine transform of each block the coefficients (u, v) with u +
    v >= 15 - diagonals are zero; done to z and to the target alike, the decoder learns that the frequencies
    of the latent are those of the image. Raises `ValueError` where a side is no multiple of 8.
    """
    if t.shape[-2] % BLOCK or t.shape[-1] % BLOCK:
        raise ValueError(
            f"regularizer.spectrum_masking works on {BLOCK} x {BLOCK} blocks, into which {t.shape[-2]} x "
            f"{t.shape[-1]} does not divide; data.resolution must be a multiple of {BLOCK} latent cells"
        )
    order = torch.arange(BLOCK, device=t.device)
    kept = (order[:, None] + order < 2 * BLOCK - 1 - diagonals).to(t)
    matrix = cosine_matrix(BLOCK).to(t)
    blocks = rearrange(t, "B n (h i) (w j) -> B n h w i j", i=BLOCK, j=BLOCK)
    blocks = matrix.T @ ((matrix @ blocks @ matrix.T) * kept) @ matrix
    return rearrange(blocks, "B n h w i j -> B n (h i) (w j)")
