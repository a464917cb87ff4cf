"""Objectives of a small model, images for them, and passes through a codec that was never there."""

import math

import torch

from latentcodec.training.losses.objective import Objective
from latentcodec.training.losses.regularizers import RegularizerConfig
from latentcodec.training.losses.sample import ForwardPass
from latentcodec.training.losses.terms import LossConfig

C, F_DOWN = 4, 4  # latent channels and downsampling factor of the small model
SEED = 0


def new_objective(loss=None, regularizer=None, whole=F_DOWN) -> Objective:
    settings = loss or LossConfig(), regularizer or RegularizerConfig()
    return Objective(*settings, SEED, C, F_DOWN, whole, torch.device("cpu"))


def images(count=3, side=32):
    return torch.rand(count, 3, side, side) * 2 - 1


def new_pass(x) -> ForwardPass:
    cells = (len(x), C, x.shape[2] // F_DOWN, x.shape[3] // F_DOWN)
    mean, logvar = torch.randn(cells), torch.randn(cells) - 1
    y = (x + 0.1 * torch.randn_like(x)).requires_grad_()
    return ForwardPass(
        mean.requires_grad_(), logvar.requires_grad_(), mean + 0.1, y, torch.tensor(math.log(0.2))
    )


def never(z):
    raise AssertionError("encoded or decoded a second time")


def halving(seen):
    """A codec that halves what it is given, and notes of which size that was."""

    def recode(y):
        seen.append(y.shape[-1])
        return 0.5 * y

    return recode
