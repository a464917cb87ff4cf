"""One image through the two-dimensional layers equals a clip of one frame through diffusers' own class."""

import pytest
import torch
from small_vaes import CAUSAL_NAMES, relative_error, small_vae

from latentcodec.vae.causal import ImageDecoder, ImageEncoder, to_channels, to_pixels
from latentcodec.vae.families import family_of


def both_encodes(vae, x):
    family = family_of(vae)
    with torch.no_grad():
        expected = vae.encode(x[:, :, None]).latent_dist.parameters[:, :, 0]
        moments = ImageEncoder(vae.encoder)(to_channels(x, family.patch(vae.config)))
        return vae.quant_conv(moments[:, :, None])[:, :, 0], expected


@pytest.mark.parametrize("name", CAUSAL_NAMES)
@pytest.mark.parametrize("batch", [1, 3])
def test_encoders_equal_the_class(name, batch):
    vae = small_vae(name)
    family = family_of(vae)
    f = family.raw_factor(vae.config)
    x = torch.rand(batch, family.image_channels(vae.config), 3 * f, 2 * f) * 2 - 1
    assert relative_error(*both_encodes(vae, x)) <= 1e-5


@pytest.mark.parametrize("name", ["qwen", "wan21"])
def test_odd_sizes_equal_the_class(name):
    vae = small_vae(name)
    assert relative_error(*both_encodes(vae, torch.rand(1, 3, 45, 27) * 2 - 1)) <= 1e-5


@pytest.mark.parametrize("name", CAUSAL_NAMES)
def test_decoders_equal_the_class(name):
    vae = small_vae(name)
    patch = family_of(vae).patch(vae.config)
    z = torch.randn(2, vae.config.z_dim, 5, 3)
    with torch.no_grad():
        expected = vae.decode(z[:, :, None]).sample[:, :, 0]
        image = ImageDecoder(vae.decoder)(vae.post_quant_conv(z[:, :, None])[:, :, 0])
    assert expected.abs().max() == 1 or expected.std() > 0.02  # a picture
    assert relative_error(to_pixels(image, patch).clamp(-1, 1), expected) <= 1e-5


@pytest.mark.parametrize("name", CAUSAL_NAMES)
def test_gradients_equal_those_of_the_class(name):
    """Also of the temporal taps that do not count: zeros."""
    ours = small_vae(name)
    torch.manual_seed(1)
    z = torch.randn(1, ours.config.z_dim, 3, 2)
    gradients = []
    for path in ("class", "layers"):
        ours.zero_grad()
        before = ours.post_quant_conv(z[:, :, None])
        if path == "class":
            ours.clear_cache()
            first = dict(first_chunk=True) if name not in ("qwen", "qwen-deep") else {}
            image = ours.decoder(before, feat_cache=ours._feat_map, feat_idx=[0], **first)[:, :, 0]
        else:
            image = ImageDecoder(ours.decoder)(before[:, :, 0])
        image.square().mean().backward()
        gradients.append({key: p.grad.clone() for key, p in ours.named_parameters() if p.grad is not None})
    theirs, mine = gradients
    assert theirs.keys() == mine.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    assert all((mine[key] - theirs[key]).abs().max() <= 1e-5 * largest for key in theirs)
