"""Random numbers that are a pure function of their keys: there is no random state to save or to agree on.

A draw is named by integers: the seed of the run, its purpose, and the position of the sample in the stream
of training samples (or the optimizer step, for what a whole step shares). A resumed run, another number
of processes and another micro-batch therefore see exactly the same numbers. Their use is elsewhere.

Shapes: B batch.
"""

import hashlib
from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a stream of random numbers is for. Two uses with one purpose would share their numbers."""

    ORDER = 0
    """The order of the images in an epoch."""
    AUGMENTATION = 1
    """Crop, flip and scale of a sample."""
    POSTERIOR = 2
    """The noise with which a sample's latent is drawn."""
    INTERPOLATIVE_NOISE = 3
    """The noise that replaces a part of a sample's latent for the decoder."""
    LATENT_NOISE_LEVEL = 4
    """How much of either noise a sample's latent gets."""
    EQUIVARIANCE = 5
    """The rotation and scale of an optimizer step."""
    DOWNSCALE = 6
    """The factor of the scale equivariance loss of an optimizer step."""
    SPECTRUM_MASK = 7
    """The frequencies masked in an optimizer step."""
    INITIALIZATION = 8
    """The weights of a new network."""
    ADDITIVE_NOISE = 9
    """The noise that is added to a sample's latent for the decoder."""
    TEXT = 10
    """The text over a sample."""
    GENERATIONS = 11
    """How often a sample has been through the codec before it is trained on."""


def keyed_generator(*keys: int) -> torch.Generator:
    """A CPU generator whose numbers depend on the keys alone: integers below 2^127, in this order.

    torch's CPU generator takes 32 bits of a seed, so among a million key tuples about a hundred pairs share
    their numbers. That is harmless for a crop; noise has 128 bits and comes from `keyed_normal`.
    """
    return torch.Generator().manual_seed(_hash(keys) % 2**32)


def keyed_normal(
    seed: int, positions: Iterable[int] | Tensor, shape: tuple[int, ...], purpose: int
) -> Tensor:
    """[B, *shape] float32, CPU: standard normal, sample i a function of (seed, purpose, positions[i])."""
    return _stack(
        numpy_generator(seed, purpose, int(position)).standard_normal(shape, dtype=np.float32)
        for position in positions
    )


def keyed_uniform(
    seed: int, positions: Iterable[int] | Tensor, shape: tuple[int, ...], purpose: int
) -> Tensor:
    """[B, *shape] float32, CPU: uniform on [0, 1), sample i a function of (seed, purpose, positions[i])."""
    return _stack(
        numpy_generator(seed, purpose, int(position)).random(shape, dtype=np.float32)
        for position in positions
    )


def numpy_generator(*keys: int) -> np.random.Generator:
    """numpy's generator for these keys: integers below 2^127, in this order.

    Philox takes a key of 128 bits and needs no warm-up: Salmon et al., "Parallel random numbers", 2011.
    """
    return np.random.Generator(np.random.Philox(key=_hash(keys)))


def _hash(keys: tuple[int, ...]) -> int:
    """128 bits of SHA-256; every key has the same width, so (1, 23) and (12, 3) differ."""
    written = b"".join(int(key).to_bytes(16, "little", signed=True) for key in keys)
    return int.from_bytes(hashlib.sha256(written).digest()[:16], "little")


def _stack(samples: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(samples)))
