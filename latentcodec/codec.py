"""LatentCodec: images to latents that a diffusion model can be trained on, and back.

It owns a genuine `diffusers.AutoencoderKL` and adds what belongs to a codec and not to a call site: the scale and
shift of the latents, sizes that are not multiples of f, and finding a model wherever it lies.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from latentcodec.autoencoder import adopt, downsampling_factor
from latentcodec.pixels import crop, pad_to_multiple
from latentcodec.single_file import load_single_file

BUNDLED = Path(__file__).parent / "weights"


def bundled_names() -> list[str]:
    """The codecs that come with the package, by the name that `LatentCodec.from_pretrained` takes."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


class LatentCodec:
    """Encodes images in [-1, 1] to latents of zero mean and unit variance, and decodes them.

    `codec.vae` is the AutoencoderKL itself: pass it as `vae=` to any diffusers pipeline.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        """Takes over `vae` in place (see `autoencoder.adopt`) and puts it into evaluation mode."""
        self.vae: AutoencoderKL = adopt(vae).eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | AutoencoderKL,
        subfolder: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> LatentCodec:
        """A codec from a folder, a hub id, one .safetensors file, a bundled name or an AutoencoderKL object.

        A folder that holds a whole pipeline is understood; its `vae` is taken. Weights are read from safetensors
        only. Raises ValueError naming `source` and what was looked for if nothing usable is found.
        """
        vae = source if isinstance(source, AutoencoderKL) else _load(str(source), subfolder)
        return cls(vae.to(device=device, dtype=dtype))

    @property
    def downsampling_factor(self) -> int:
        """f: pixels per latent cell, along each side."""
        return downsampling_factor(self.vae.config)

    @property
    def latent_channels(self) -> int:
        """c."""
        return int(self.vae.config.latent_channels)

    @property
    def image_channels(self) -> int:
        """C, of the images that go in."""
        return int(self.vae.config.in_channels)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vae.device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights, in which the network computes."""
        return self.vae.dtype

    @property
    def latents_mean(self) -> Tensor:
        """[c, 1, 1] float32: what is subtracted from a raw latent; per channel if the config says so."""
        mean = self.vae.config.latents_mean
        if mean is None:
            mean = [self.vae.config.shift_factor or 0.0] * self.latent_channels
        return torch.tensor(mean, dtype=torch.float32, device=self.device)[:, None, None]

    @property
    def latents_std(self) -> Tensor:
        """[c, 1, 1] float32: what the difference is then divided by."""
        std = self.vae.config.latents_std
        if std is None:
            std = [1.0 / self.vae.config.scaling_factor] * self.latent_channels
        return torch.tensor(std, dtype=torch.float32, device=self.device)[:, None, None]

    @torch.no_grad()
    def encode(self, x: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> [B, c, ceil(H / f), ceil(W / f)] float32 of zero mean and unit variance.

        The posterior's mode, or with `sample` a draw from it. The right and the bottom edge are repeated up to the
        next multiple of f. Raises ValueError for another shape.
        """
        self._require(x, self.image_channels, "an image batch [B, C, H, W]")
        x = pad_to_multiple(x.to(self.device, self.dtype), self.downsampling_factor)
        posterior = self.vae.encode(x).latent_dist
        raw = posterior.sample(generator=generator) if sample else posterior.mode()
        return (raw.float() - self.latents_mean) / self.latents_std

    @torch.no_grad()
    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[B, c, h, w] from `encode` -> [B, C, h f, w f] float32, or cropped to `size` = (H, W); about [-1, 1].

        Not clamped: `save_image` and the metrics do that. Raises ValueError for another shape, or for a `size` that
        does not belong to these latents.
        """
        self._require(z, self.latent_channels, "a latent batch [B, c, h, w]")
        f = self.downsampling_factor
        if size is not None and (-(-size[0] // f), -(-size[1] // f)) != tuple(z.shape[-2:]):
            raise ValueError(
                f"size {tuple(size)} does not belong to latents of {z.shape[-2]} x {z.shape[-1]}, f = {f}"
            )
        raw = z.to(self.device).float() * self.latents_std + self.latents_mean
        y = self.vae.decode(raw.to(self.dtype)).sample.float()
        return y if size is None else crop(y, size)

    def plug_into(self, pipe: Any) -> Any:
        """Make this codec's VAE the VAE of a diffusers pipeline that already exists; returns the pipeline.

        Raises ValueError if the pipeline has no VAE, or if its denoiser was made for other latents.
        """
        if getattr(pipe, "vae", None) is None:
            raise ValueError(f"{type(pipe).__name__} has no component 'vae' to replace")
        old = pipe.vae.config
        for key, ours, theirs in (
            ("latent_channels", self.latent_channels, old.latent_channels),
            ("downsampling factor", self.downsampling_factor, downsampling_factor(old)),
        ):
            if ours != theirs:
                raise ValueError(
                    f"this codec has {key} {ours}, the pipeline's VAE has {theirs}: its denoiser was trained on other "
                    "latents"
                )
        pipe.register_modules(vae=self.vae.to(pipe.vae.device, pipe.vae.dtype))
        return pipe

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> None:
        """Write a plain AutoencoderKL folder, config.json and safetensors, with a model card README.md.

        `card` is the card's text (Markdown); without it, one that states the shapes and how to load the folder.
        """
        folder = Path(folder)
        self.vae.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner may read
        (folder / "README.md").write_text(card or self.model_card())

    def model_card(self, details: str = "") -> str:
        """Markdown with the metadata that the hub reads; `details` go between the shapes and the usage."""
        config = self.vae.config
        parameters = sum(parameter.numel() for parameter in self.vae.parameters())
        return _CARD.format(
            f=self.downsampling_factor,
            c=self.latent_channels,
            channels=self.image_channels,
            parameters=f"{parameters:,}",
            widths=", ".join(map(str, config.block_out_channels)),
            details=f"{details.strip()}\n\n" if details else "",
        )

    def _require(self, x: Tensor, channels: int, what: str) -> None:
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"expected {what} with {channels} channels, got shape {list(x.shape)}")


_CARD = """---
library_name: diffusers
tags: [latentcodec, autoencoder, vae]
---
# A latent codec: f{f}, {c} latent channels

An `AutoencoderKL` with {parameters} parameters (widths {widths}): an image of {channels} channels and H x W pixels
becomes {c} latents of H/{f} x W/{f}.

{details}## Use

```python
from diffusers import AutoencoderKL                     # as any VAE of a pipeline
vae = AutoencoderKL.from_pretrained("path/to/this/folder")

from latentcodec import LatentCodec, load_image, save_image   # normalised latents, any image size
codec = LatentCodec.from_pretrained("path/to/this/folder")
x = load_image("photo.jpg")
z = codec.encode(x)
save_image(codec.decode(z, size=x.shape[-2:]), "reconstruction.png")
```
"""


def _load(source: str, subfolder: str | None) -> AutoencoderKL:
    path = BUNDLED / source if source in bundled_names() else Path(source)
    if path.is_file():
        return load_single_file(path)
    if path.is_dir():
        if subfolder is None and (path / "model_index.json").exists():
            subfolder = "vae"
        _require_folder(path if subfolder is None else path / subfolder)
    elif source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(
            f"{source!r} is no folder, no file, no hub id and none of {', '.join(bundled_names())}"
        )
    try:
        return AutoencoderKL.from_pretrained(str(path), subfolder=subfolder, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load an AutoencoderKL from {source!r}: {reason}") from None


def _require_folder(folder: Path) -> None:
    """Say what is missing in a local folder before diffusers goes looking for it on the hub."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no AutoencoderKL folder: it holds no config.json")
    try:
        name = json.loads(file.read_text()).get("_class_name")
    except (ValueError, AttributeError):
        raise ValueError(f"{file} is not a JSON object") from None
    if name not in (None, "AutoencoderKL"):
        raise ValueError(f"{file} describes a {name}, not an AutoencoderKL")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no .safetensors weights; pickled .bin files are not loaded, they can run code"
        )
