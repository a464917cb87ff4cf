"""LatentCodec: any image size in and out, and latents of unit variance by the conventions of the pipelines."""

from types import SimpleNamespace

import pytest
import torch
from tiny_codecs import stock, tiny_vae
from torch import nn

from latentcodec import LatentCodec


@pytest.fixture
def codec():
    return LatentCodec(tiny_vae())


# ---- sizes and channels


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (8, 12), (13, 31), (30, 17)])
def test_every_size_is_encoded_and_comes_back(size, codec):
    height, width = size
    x = torch.rand(2, 3, height, width) * 2 - 1
    z = codec.encode(x)
    assert z.shape == (2, 4, -(-height // 4), -(-width // 4))
    assert codec.decode(z, size=size).shape == x.shape
    assert codec.decode(z).shape == (2, 3, 4 * z.shape[2], 4 * z.shape[3])


def test_an_odd_size_is_continued_by_its_last_row_and_column(codec):
    x = torch.rand(1, 3, 6, 7)
    whole = nn.functional.pad(x, (0, 1, 0, 2), mode="replicate")
    z = codec.encode(x)
    assert torch.equal(z, codec.encode(whole))
    assert torch.equal(codec.decode(z, size=(6, 7)), codec.decode(z)[..., :6, :7])


def test_a_batch_is_its_images_one_by_one(codec):
    x = torch.rand(3, 3, 8, 12)
    together, apart = codec.encode(x), torch.cat([codec.encode(image[None]) for image in x])
    assert torch.allclose(together, apart, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_channels(channels):
    codec = LatentCodec(tiny_vae(in_channels=channels, out_channels=channels))
    x = torch.rand(1, channels, 5, 6)
    assert codec.image_channels == channels
    assert codec.decode(codec.encode(x), size=(5, 6)).shape == x.shape


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 2, 8, 8),
        torch.zeros(1, 1, 8, 8),
        torch.zeros(3, 8, 8),
        torch.zeros(1, 3, 0, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=["two channels", "one channel", "no batch", "no pixels", "integers"],
)
def test_what_is_no_image_batch_is_refused_with_its_shape_and_type(x, codec):
    with pytest.raises(
        ValueError, match=rf"3 channels, got {x.dtype} of shape \[{', '.join(map(str, x.shape))}"
    ):
        codec.encode(x)


def test_latents_of_another_model_are_refused(codec):
    with pytest.raises(ValueError, match=r"latent batch .* 4 channels, got .* \[1, 16, 2, 2\]"):
        codec.decode(torch.zeros(1, 16, 2, 2))


@pytest.mark.parametrize("size", [(9, 8), (4, 8), (8, 0), (1, 4, 8, 8)])
def test_a_size_that_these_latents_cannot_have_is_refused(size, codec):
    with pytest.raises(ValueError, match=r"does not belong to latents of 2 x 2, f = 4"):
        codec.decode(torch.zeros(1, 4, 2, 2), size=size)


def test_encoding_leaves_no_graph_behind(codec):
    assert not codec.encode(torch.rand(1, 3, 4, 4, requires_grad=True)).requires_grad


def test_a_grey_codec_is_not_plugged_into_a_pipeline_of_colour_images():
    old = tiny_vae()
    pipe = SimpleNamespace(vae=old)
    with pytest.raises(ValueError, match="1 image channels, the pipeline's VAE has 3"):
        LatentCodec(tiny_vae(in_channels=1, out_channels=1)).plug_into(pipe)
    assert pipe.vae is old


# ---- the scale of the latents


def encoder_of_brightness(**others):
    """A VAE whose raw latent is known: channel i has the mean over all pixels times (i + 1), plus i."""
    vae = tiny_vae(**others)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        c = vae.config.latent_channels
        vae.quant_conv.bias[:c] = torch.arange(c)
        vae.quant_conv.bias[c:] = -2 * torch.arange(1, c + 1)  # log-variances
    return vae


def test_statistics_per_channel_are_divided_out_and_multiplied_back():
    mean, std = [1.0, -2.0, 0.5, 0.0], [2.0, 0.5, 1.0, 3.0]
    codec = LatentCodec(encoder_of_brightness(latents_mean=mean, latents_std=std, scaling_factor=7.0))
    z = codec.encode(torch.zeros(1, 3, 4, 4)).flatten()
    expected = (torch.arange(4) - torch.tensor(mean)) / torch.tensor(std) * 7  # as SDXL's pipelines have it
    assert torch.allclose(z, expected)
    raw = []
    codec.vae.decoder.conv_in.register_forward_pre_hook(lambda _, inputs: raw.append(inputs[0]))
    codec.vae.post_quant_conv = nn.Identity()
    codec.decode(z[None, :, None, None])
    assert torch.allclose(raw[0].flatten(), torch.arange(4).float())


def test_scale_and_shift_follow_the_convention_of_the_pipelines():
    """z = (raw - shift_factor) * scaling_factor, as in StableDiffusion3Pipeline and FluxPipeline."""
    vae = tiny_vae(scaling_factor=1.5305, shift_factor=0.0609)
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        raw = stock(vae).encode(x).latent_dist.mode()
        image = stock(vae).decode(raw).sample
    codec = LatentCodec(vae)
    z = codec.encode(x)
    assert torch.allclose(z, (raw - 0.0609) * 1.5305, atol=1e-4)
    assert torch.allclose(codec.decode(z), image, atol=1e-4)


def test_measured_statistics_give_latents_of_unit_variance():
    vae = tiny_vae()
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = vae.eval().encode(x).latent_dist.mode()
    vae.register_to_config(
        latents_mean=raw.mean((0, 2, 3)).tolist(),
        latents_std=raw.std((0, 2, 3)).tolist(),
        scaling_factor=1.0,
    )
    z = LatentCodec(vae).encode(x)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(4), atol=1e-3)


def test_a_sample_has_the_posteriors_mean_and_deviation_and_follows_its_generator():
    codec = LatentCodec(encoder_of_brightness(scaling_factor=1.0))
    x = torch.zeros(1, 3, 200, 200)

    def draw(seed):
        return codec.encode(x, sample=True, generator=torch.Generator().manual_seed(seed))

    z = draw(1)
    assert torch.equal(z, draw(1))
    assert not torch.equal(z, draw(2))
    assert not torch.equal(z, codec.encode(x))
    assert torch.allclose(z.mean((0, 2, 3)), torch.arange(4.0), atol=0.03)
    deviation = torch.exp(-torch.arange(1.0, 5.0))
    assert torch.allclose(z.std((0, 2, 3)), deviation, rtol=0.05)


def test_the_mode_is_the_default_and_needs_no_seed(codec):
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(codec.encode(x), codec.posterior(x)[0])
