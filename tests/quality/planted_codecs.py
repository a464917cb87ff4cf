"""Codecs whose faults are known, and smooth pictures for them."""

import torch

from latentcodec.quality.klt import KLT


def smooth_images(count=100, side=64):
    """[N, 3, S, S] in [-1, 1]: noise whose amplitude falls with the frequency, as that of photographs does."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]).clamp(
        min=1 / side
    )
    noise = torch.fft.rfft2(torch.randn(count, 3, side, side, generator=generator)) / frequency**1.5
    images = torch.fft.irfft2(noise)
    return (0.35 * images / images.std((2, 3), keepdim=True)).clamp(-1, 1)


IMAGES = smooth_images()


class Planted:
    """The KLT of 8 x 8 blocks as a codec, with a posterior whose noise, scale and dead channels are chosen."""

    downsampling_factor = 8

    def __init__(self, images, c=8, noise=0.1, white=True, dead=(), constant=(), ignored=(), collapsed=False):
        self.klt = KLT.fit(images, 8, c)
        self.latent_channels, self.noise, self.collapsed = c, noise, collapsed
        deviations = self.klt.std / self.klt.variance.mean().sqrt()
        self.scale = torch.ones(c, 1, 1) if white else deviations[:, None, None]
        self.dead, self.constant, self.ignored = [*dead], [*constant], [*ignored]
        fitted = self.klt.encode(torch.stack([*images]))
        self.fitted_mean, self.fitted_std = fitted.mean((0, 2, 3)), fitted.std((0, 2, 3))

    def posterior(self, x):
        mean = self.klt.encode(x) * self.scale
        std = self.noise * torch.ones_like(mean) * self.scale
        generator = torch.Generator().manual_seed(len(x))
        for k in self.dead:
            mean[:, k], std[:, k] = 0.01 * torch.randn(mean[:, k].shape, generator=generator), 1.0
        for k in self.constant:
            mean[:, k], std[:, k] = 0.3, 1e-4
        for k in self.ignored:
            mean[:, k] = torch.randn(mean[:, k].shape, generator=generator)
        if self.collapsed:
            mean, std = 1e-3 * mean, torch.ones_like(std)
        return mean, std

    def decode(self, z, size=None):
        z = z / self.scale
        z = 1e-3 * z if self.collapsed else z
        for k in (*self.dead, *self.constant, *self.ignored):
            z[:, k] = self.fitted_mean[k]
        return self.klt.decode(z, size)
