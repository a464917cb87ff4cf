"""However diffusers' own networks can be called, they give the same numbers after adopting, or say why not.

Arguments by position and by name, block by block, results that libraries take, other attention processors.
"""

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from safetensors.torch import save
from stock_pairs import CONFIGS, X, Z, close, pair

from latentcodec import LatentCodec, optimize_vae, restore_vae
from latentcodec.adopt import adopt
from latentcodec.engine.plan import Engine


def block_by_block(decoder, z, temb):
    """A forward pass as people write it anew after diffusers' pattern."""
    z = decoder.mid_block(decoder.conv_in(z), temb)
    for block in decoder.up_blocks:
        z = block(z, temb)
    return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(z)))


def down_by_down(encoder, x):
    x = encoder.conv_in(x)
    for block in encoder.down_blocks:
        x = block(x)
    return encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(x))))


CALLS = {
    "encode(x)": lambda vae, x, z: vae.encode(x).latent_dist.parameters,
    "encode(x, return_dict=False)": lambda vae, x, z: vae.encode(x, return_dict=False)[0].parameters,
    "decode(z)": lambda vae, x, z: vae.decode(z).sample,
    "decode(z, return_dict=False)": lambda vae, x, z: vae.decode(z, return_dict=False)[0],
    "vae(x)": lambda vae, x, z: vae(x).sample,
    "vae(sample=x)": lambda vae, x, z: vae(sample=x, sample_posterior=False).sample,
    "encoder(x)": lambda vae, x, z: vae.encoder(x),
    "encoder(sample=x)": lambda vae, x, z: vae.encoder(sample=x),
    "decoder(z)": lambda vae, x, z: vae.decoder(z),
    "decoder(z, None)": lambda vae, x, z: vae.decoder(z, None),
    "decoder(sample=z, latent_embeds=None)": lambda vae, x, z: vae.decoder(sample=z, latent_embeds=None),
    "down blocks": lambda vae, x, z: down_by_down(vae.encoder, x),
    "up blocks with temb None": lambda vae, x, z: block_by_block(vae.decoder, z, None),
    "up blocks with a temb": lambda vae, x, z: block_by_block(vae.decoder, z, torch.full((1, 1, 1, 1), 0.5)),
    "mid_block with a temb for each channel": lambda vae, x, z: (
        vae.decoder.mid_block(  # a norm hides a constant
            vae.decoder.conv_in(z), torch.linspace(-1, 1, vae.config.block_out_channels[-1])[:, None, None]
        )
    ),
    "mid_block(hidden_states=, temb=)": lambda vae, x, z: vae.decoder.mid_block(
        hidden_states=vae.decoder.conv_in(z), temb=None
    ),
    "up_block(hidden_states=, temb=)": lambda vae, x, z: vae.decoder.up_blocks[0](
        hidden_states=vae.decoder.conv_in(z), temb=None
    ),
    "down_block(hidden_states=)": lambda vae, x, z: vae.encoder.down_blocks[0](
        hidden_states=vae.encoder.conv_in(x)
    ),
    "resnet(input_tensor=, temb=)": lambda vae, x, z: vae.decoder.mid_block.resnets[0](
        input_tensor=vae.decoder.conv_in(z), temb=None
    ),
    "attention(h, temb=)": lambda vae, x, z: vae.decoder.mid_block.attentions[0](
        vae.decoder.conv_in(z), temb=None
    ),
    "attention(hidden_states=)": lambda vae, x, z: vae.decoder.mid_block.attentions[0](
        hidden_states=vae.decoder.conv_in(z)
    ),
    "downsampler(hidden_states=)": lambda vae, x, z: vae.encoder.down_blocks[0].downsamplers[0](
        hidden_states=vae.encoder.down_blocks[0].resnets[0](vae.encoder.conv_in(x), None)
    ),
    "upsampler(h, output_size)": lambda vae, x, z: vae.decoder.up_blocks[0].upsamplers[0](
        vae.decoder.conv_in(z), (13, 9)
    ),
    "upsampler(hidden_states=)": lambda vae, x, z: vae.decoder.up_blocks[0].upsamplers[0](
        hidden_states=vae.decoder.conv_in(z)
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_diffusers_gives_its_numbers(vaes, name, grad):
    x, z = torch.rand(X) * 2 - 1, torch.randn(Z)
    with torch.set_grad_enabled(grad):
        theirs, ours = (CALLS[name](vae, x, z) for vae in vaes)
    close(ours.detach(), theirs.detach())


def test_an_image_on_another_device_than_the_vae_is_left_to_torch(vaes):
    """Which says that they are apart; the engine would read one device's addresses on the other."""
    ours, x = copy.deepcopy(vaes[1]), torch.rand(X)
    with torch.no_grad():
        assert ours.encoder.engine.applies(ours.encoder, x)
        assert not ours.encoder.engine.applies(ours.to("meta").encoder, x)


def test_latent_embeds_are_refused_as_the_class_refuses_them(vaes):
    for vae, error in zip(vaes, (TypeError, ValueError), strict=True):
        with torch.no_grad(), pytest.raises(error):
            vae.decoder(torch.randn(Z), torch.zeros(1, 1, 1, 1))


def test_the_engine_runs_where_nothing_speaks_against_it(vaes, strips):
    with torch.no_grad():
        vaes[1].decode(torch.randn(Z))
    assert strips
    assert isinstance(vaes[1].decoder.engine, Engine)


# ---- results that libraries take


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_results_can_be_saved_and_viewed(batch, layout):
    vae = optimize_vae(AutoencoderKL(**CONFIGS["flux"]).eval())
    vae.to(memory_format=layout)
    with torch.no_grad():
        z = vae.encode(torch.rand(batch, 3, 64, 96)).latent_dist
        image = vae.decode(z.mode()).sample
    for value in (image, z.parameters, *((z.mode(), z.sample() * 0.18) if batch == 1 else ())):
        save({"value": value})
        value.view(batch, -1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_results_of_a_codec_can_be_saved_and_viewed(layout):
    codec = LatentCodec(pair(CONFIGS["sd"])[0])
    codec.vae.to(memory_format=layout)
    x = torch.rand(2, 3, 61, 90)
    z = codec.encode(x)
    for value in (z, z[0], codec.decode(z), codec.decode(z, size=(61, 90))):
        save({"value": value})
        value.view(len(value), -1)


# ---- attention processors


def test_processors_are_listed_and_changed_as_in_diffusers(vaes):
    reference, vae = (copy.deepcopy(side) for side in vaes)
    assert list(vae.attn_processors) == list(reference.attn_processors)
    assert all(type(p) is AttnProcessor2_0 for p in vae.attn_processors.values())
    for change in (
        lambda v: v.set_attn_processor(AttnProcessor()),
        lambda v: v.set_attn_processor({name: SlicedAttnProcessor(1) for name in v.attn_processors}),
        lambda v: v.set_default_attn_processor(),
    ):
        for side in (reference, vae):
            change(side)
        types = [[type(p) for p in side.attn_processors.values()] for side in (reference, vae)]
        assert types[0] == types[1]
        with torch.no_grad():
            close(vae.decoder(torch.ones(Z)), reference.decoder(torch.ones(Z)))


class Doubled(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def test_a_processor_of_ones_own_is_refused_in_words_and_works_after_restoring():
    reference, vae = pair(CONFIGS["sd"])
    with pytest.raises(ValueError, match=r"cannot compute by a Doubled.*restore_vae"):
        vae.set_attn_processor(Doubled())
    restore_vae(vae).set_attn_processor(Doubled())
    reference.set_attn_processor(Doubled())
    with torch.no_grad():
        close(vae.decoder(torch.ones(Z)), reference.decoder(torch.ones(Z)))
    with pytest.raises(ValueError, match="cannot compute by a Doubled"):
        adopt(vae)
