"""Which image stands at which position of the training stream, in what shape, and which positions go to whom.

Only numbers: nothing here reads an image. Positions count the samples of the stream from its very beginning,
and all of this is a pure function of (seed, position), so there is no state to save. Shapes: H W pixels, N
images.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from latentcodec.randomness import Purpose, keyed_generator

BUCKET_MULTIPLE = 32  # pixels; sides of the buckets that are not square
BUCKET_ASPECT = 2.0  # no bucket is more oblong than this


def shuffled(values: NDArray[np.int64], seed: int, *keys: int) -> NDArray[np.int64]:
    """A permutation of `values` that depends on the seed and the keys alone."""
    generator = keyed_generator(seed, Purpose.ORDER, *keys)
    return values[torch.randperm(len(values), generator=generator).numpy()]


class EpochOrder:
    """Every epoch is a new permutation of the images, and every crop is a square.

    `len` is the number of positions in an epoch: position // len is the epoch.
    """

    def __init__(self, images: NDArray[np.int64], resolution: int, seed: int) -> None:
        self.images, self.resolution, self.seed = images, resolution, seed
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def crop_size(self, position: int) -> tuple[int, int]:
        """Height and width of the crop at a position."""
        return self.resolution, self.resolution

    def images_from(self, position: int) -> Iterator[int]:
        """The image at a position, and after it the rest of its epoch's order, once around: the
        substitutes."""
        epoch, place = divmod(position, len(self))
        order = self._epoch(epoch)
        for step in range(len(order)):
            yield int(order[(place + step) % len(order)])

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            # A batch may touch two epochs; keeping more would only fill the memory.
            self._epochs = {key: order for key, order in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = self._arrange(epoch)
        return self._epochs[epoch]

    def _arrange(self, epoch: int) -> NDArray[np.int64]:
        return shuffled(self.images, self.seed, epoch)


class BucketedOrder(EpochOrder):
    """Every `block` positions share one crop shape, and hold images whose own aspect ratio is nearest to it.

    A block is the global batch of an optimizer step (ranks x micro-batch x accumulation). The last block of a
    shape is filled up from that shape's first images of the epoch, so an epoch shows every image at least
    once.
    """

    def __init__(
        self, images: NDArray[np.int64], buckets: NDArray[np.int64], resolution: int, seed: int, block: int
    ) -> None:
        super().__init__(images, resolution, seed)
        self.sizes = bucket_sizes(resolution)
        self.members = [images[buckets == number] for number in range(len(self.sizes))]
        self.block = block
        self._shapes = np.repeat(np.arange(len(self.sizes)), [-(-len(m) // block) for m in self.members])

    def __len__(self) -> int:
        return len(self._shapes) * self.block

    def crop_size(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, len(self))
        return self.sizes[self._block_shapes(epoch)[place // self.block]]

    def _block_shapes(self, epoch: int) -> NDArray[np.int64]:
        return shuffled(self._shapes, self.seed, epoch)

    def _arrange(self, epoch: int) -> NDArray[np.int64]:
        blocks = []
        for number, members in enumerate(self.members):
            filled = -(-len(members) // self.block) * self.block
            order = np.resize(shuffled(members, self.seed, epoch, number), filled) if filled else members
            blocks.append(iter(order.reshape(-1, self.block)))
        return np.concatenate([next(blocks[number]) for number in self._block_shapes(epoch)])


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """The crop shapes of aspect-ratio buckets: the square first, then every one with sides that are multiples
    of 32.

    None has more pixels than the square, and for each height the width is the largest that fits.
    """
    sizes = [(resolution, resolution)]
    for height in range(BUCKET_MULTIPLE, 2 * resolution + 1, BUCKET_MULTIPLE):
        width = resolution * resolution // height // BUCKET_MULTIPLE * BUCKET_MULTIPLE
        if height != width and width and max(height, width) <= BUCKET_ASPECT * min(height, width):
            sizes.append((height, width))
    return sizes


def nearest_bucket(size: tuple[int, int], sizes: list[tuple[int, int]]) -> int:
    """The number of the bucket whose aspect ratio is nearest, in log scale, to that of an image of H x W."""
    return min(
        range(len(sizes)), key=lambda k: abs(math.log(size[0] * sizes[k][1] / (size[1] * sizes[k][0])))
    )


class Positions(Sampler[list[int]]):
    """The positions of each micro-batch of one rank, in order; endless when `steps` is None.

    Rank r of R with micro-batch b takes, at optimizer step s and accumulation index a of A, the positions
    ((s*A + a)*R + r)*b and the b - 1 after it.
    """

    def __init__(
        self,
        batch_size: int,
        accumulation: int,
        start_step: int,
        steps: int | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.first = start_step * accumulation  # micro-batches, counted from the beginning of the training
        self.count = None if steps is None else steps * accumulation

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.of, itertools.islice(itertools.count(self.first), self.count))

    def of(self, batch: int) -> list[int]:
        """The positions of this rank's micro-batch number `batch`."""
        first = (batch * self.world_size + self.rank) * self.batch_size
        return list(range(first, first + self.batch_size))
