"""The README.md of a codec's folder: what it is, with the metadata that the hub reads, and how it is loaded."""

from __future__ import annotations

from typing import Any

from latentcodec.vae.families import family_of
from latentcodec.vae.padding import padding_mode


def model_card(vae: Any, details: str = "") -> str:
    """Markdown for a VAE of a covered class; `details` go between the shapes and the usage."""
    family, config = family_of(vae), vae.config
    if (mode := padding_mode(vae)) != "zeros":
        details = f"{details.strip()}\n\n## Padding\n\nMind: {zero_padded(f'`{mode}`')}."
    channels = family.image_channels(config)
    return _CARD.format(
        f=family.downsampling_factor(config),
        c=family.latent_channels(config),
        channels=channels,
        argument="" if channels == 3 else f", channels={channels}",
        parameters=f"{sum(parameter.numel() for parameter in vae.parameters()):,}",
        widths=", ".join(map(str, family.widths(config))),
        name=family.name,
        details=f"{details.strip()}\n\n" if details else "",
    )


def zero_padded(mode: str) -> str:
    """What people are told who save a codec whose convolutions pad by `mode`."""
    return (
        f"the convolutions of this codec pad by {mode}, which no class of diffusers can hold. Loaded by diffusers "
        "alone it pads with zeros, and is wrong near the borders: load it with LatentCodec.from_pretrained, or give "
        "the loaded VAE to optimize_vae"
    )


_CARD = """---
library_name: diffusers
tags: [latentcodec, autoencoder, vae]
---
# A latent codec: f{f}, {c} latent channels

An `{name}` with {parameters} parameters (widths {widths}): an image of {channels} channels and H x W pixels
becomes {c} latents of H/{f} x W/{f}.

{details}## Use

```python
from diffusers import {name}                     # as any VAE of a pipeline
vae = {name}.from_pretrained("path/to/this/folder")

from latentcodec import LatentCodec, load_image, save_image   # normalised latents, any image size
codec = LatentCodec.from_pretrained("path/to/this/folder")
x = load_image("photo.jpg"{argument})
z = codec.encode(x)
save_image(codec.decode(z, size=x.shape[-2:]), "reconstruction.png")
```
"""
