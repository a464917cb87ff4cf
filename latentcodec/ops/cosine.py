"""The discrete cosine transform, for spectra of latents and pictures."""

import math

import torch
from torch import Tensor


def cosine_matrix(n: int) -> Tensor:
    """[n, n] float64 on the CPU: the orthonormal discrete cosine transform (DCT-II), a row for each frequency."""
    place = torch.arange(n, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi / n * place[:, None] * (place + 0.5)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix
