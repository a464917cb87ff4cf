"""The linear codec every quality claim is measured against: the Karhunen-Loeve transform of image blocks.

An image is cut into f x f blocks over all its channels and each block is projected on the c directions of
largest variance (principal components). No other linear map of single blocks with c numbers has a smaller
squared error, so a trained codec of the same latent shape has to beat it. Fitted from images, never trained;
nothing is written to disk here.

Shapes: B batch, C channels, H W pixels, h w latent cells, f downsampling factor, c latent channels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from latentcodec.pixels import crop, pad_to_multiple

# All 8 x 8 blocks of a 256 x 256 image; keeps a large photograph from outweighing the rest.
BLOCKS_PER_IMAGE = 1024
# Far below an 8-bit step of 2 / 255: a direction that the images never use codes to about zero.
SMALLEST_STD = 1e-6


@dataclass(frozen=True)
class KLT:
    """Principal components of image blocks, with `encode` and `decode` as a `LatentCodec` has them."""

    basis: Tensor
    """[c, C, f, f] float32: orthonormal directions in pixel space, by falling variance; each has its entry of
    largest magnitude positive, so that the signs do not depend on the linear algebra library."""
    mean: Tensor
    """[C, f, f] float32: the mean block."""
    variance: Tensor
    """[c] float32: the variance of the images' blocks along each direction."""

    @classmethod
    def fit(cls, images: Iterable[Tensor], downsampling_factor: int, latent_channels: int) -> "KLT":
        """The c principal components of the blocks of `images`, each [C, H, W] in [-1, 1], of any sizes.

        Every image is padded as `encode` does it. Of an image with more than 1024 blocks, 1024 are drawn by a
        fixed permutation, so two fits to the same images agree. Raises `ValueError` where the images have
        fewer blocks than `latent_channels` needs, or a block has fewer than `latent_channels` numbers.
        """
        count = channels = 0
        total = second = torch.zeros(())  # become [D] and [D, D] float64, D = C f f
        for image in images:
            blocks = _blocks(image[None], downsampling_factor).flatten(0, 2)  # [N, D]
            if len(blocks) > BLOCKS_PER_IMAGE:
                order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
                blocks = blocks[order[:BLOCKS_PER_IMAGE]]
            blocks = blocks.double()
            channels = len(image)
            count += len(blocks)
            total = total + blocks.sum(0)
            second = second + blocks.T @ blocks
        _check_counts(count, channels * downsampling_factor**2, latent_channels)
        mean = total / count
        variances, directions = torch.linalg.eigh(second / count - torch.outer(mean, mean))  # rising
        basis = directions.T.flip(0)[:latent_channels]  # [c, D]
        basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        shape = {"C": channels, "i": downsampling_factor, "j": downsampling_factor}
        return cls(
            basis=rearrange(basis, "c (C i j) -> c C i j", **shape).float(),
            mean=rearrange(mean, "(C i j) -> C i j", **shape).float(),
            variance=variances.flip(0)[:latent_channels].clamp(min=0).float(),
        )

    @property
    def downsampling_factor(self) -> int:
        """f: pixels a side of a block."""
        return self.basis.shape[-1]

    @property
    def latent_channels(self) -> int:
        """c: numbers kept of each block."""
        return self.basis.shape[0]

    @property
    def image_channels(self) -> int:
        """C: channels of the images it was fitted on."""
        return self.basis.shape[1]

    @property
    def std(self) -> Tensor:
        """[c]: what a coefficient is divided by; the root of `variance`, kept above 1e-6."""
        return self.variance.sqrt().clamp(min=SMALLEST_STD)

    def encode(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, c, ceil(H / f), ceil(W / f)], unit variance over the images of the fit.

        The right and the bottom edge are repeated up to the next multiple of f. Computed in the dtype of `x` and
        where `x` is; C is that of the images of the fit.
        """
        centred = _blocks(x, self.downsampling_factor) - self.mean.flatten().to(x)  # [B, h, w, D]
        z = centred @ self.basis.flatten(1).T.to(x) / self.std.to(x)  # [B, h, w, c]
        return rearrange(z, "B h w c -> B c h w")

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[B, c, h, w] -> [B, C, h f, w f] or, cropped, [B, C, *size]; not clamped."""
        scaled = rearrange(z, "B c h w -> B h w c") * self.std.to(z)
        blocks = scaled @ self.basis.flatten(1).to(z) + self.mean.flatten().to(z)  # [B, h, w, D]
        f = self.downsampling_factor
        y = rearrange(blocks, "B h w (C i j) -> B C (h i) (w j)", i=f, j=f)
        return y if size is None else crop(y, size)


def _blocks(x: Tensor, f: int) -> Tensor:
    """[B, C, H, W] -> [B, h, w, C f f]: the padded image as a grid of flat blocks."""
    return rearrange(pad_to_multiple(x, f), "B C (h i) (w j) -> B h w (C i j)", i=f, j=f)


def _check_counts(blocks: int, dimensions: int, latent_channels: int) -> None:
    if blocks == 0:
        raise ValueError("a KLT needs images to be fitted on, and none was given")
    if latent_channels > dimensions:
        raise ValueError(f"a block has {dimensions} numbers; a KLT cannot keep {latent_channels} of them")
    if blocks <= latent_channels:
        raise ValueError(
            f"{blocks} blocks cannot fix {latent_channels} principal components; give more or larger images"
        )
