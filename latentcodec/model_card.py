"""The model card of a saved codec: Markdown that the hub and its reader understand.

Shapes: C image channels, c latent channels, H W pixels, f downsampling factor.
"""

from collections.abc import Sequence

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


def model_card(
    name: str, f: int, c: int, channels: int, widths: Sequence[int], parameters: int, details: str
) -> str:
    """The card of a VAE of diffusers' class `name`; `details` are Markdown, and go between the shapes and the usage."""
    return _CARD.format(
        f=f,
        c=c,
        channels=channels,
        argument="" if channels == 3 else f", channels={channels}",
        parameters=f"{parameters:,}",
        widths=", ".join(map(str, widths)),
        name=name,
        details=f"{details.strip()}\n\n" if details else "",
    )
