"""What was changed in a VAE before it is adopted, or before it is restored, is kept or refused by name."""

import logging
import re

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from small_vaes import SMALL, images_for, relative_error, results, small_vae
from torch import nn

from latentcodec.adopt import adopt, optimize_vae, restore_vae


@pytest.mark.parametrize("name", SMALL)
def test_replaced_layers_are_refused(name):
    vae = small_vae(name)
    vae.decoder.conv_out = torch.nn.Conv2d(3, 3, 3)
    with pytest.raises(ValueError, match="not those of its config, first at 'conv_out"):
        adopt(vae)


BLOCK = "decoder.mid_block.resnets.0"


class OtherConv2d(nn.Conv2d):
    """Of a library, or a user's own."""


def with_own_convolution(vae):
    """As people pad textures without seams."""
    layer = vae.encoder.conv_in
    layer._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, weight, bias, padding=1)


CHANGES = {
    "encoder.conv_in": with_own_convolution,
    "decoder.conv_out is": lambda vae: setattr(vae.decoder.conv_out, "__class__", OtherConv2d),
    "decoder.conv_act is": lambda vae: setattr(vae.decoder, "conv_act", nn.Identity()),
    "decoder.conv_in.padding": lambda vae: vars(vae.decoder.conv_in).update(dilation=(2, 2), padding=(2, 2)),
    "decoder.conv_in.dilation": lambda vae: vars(vae.decoder.conv_in).update(dilation=(2, 2)),
    f"{BLOCK}.norm1.eps": lambda vae: vars(vae.get_submodule(f"{BLOCK}.norm1")).update(eps=1e-2),
}
OF_DIFFUSERS = {
    f"{BLOCK}.output_scale_factor": lambda vae: vars(vae.get_submodule(BLOCK)).update(
        output_scale_factor=2.0
    ),
    "attentions.0.heads": lambda vae: vars(vae.decoder.mid_block.attentions[0]).update(heads=2),
    "attentions.0.rescale_output_factor": lambda vae: vars(vae.decoder.mid_block.attentions[0]).update(
        rescale_output_factor=2.0
    ),
}


@pytest.mark.parametrize("name", CHANGES | OF_DIFFUSERS)
def test_layers_that_were_changed_before_adopting_are_refused_by_name(name):
    vae = small_vae("kl")
    (CHANGES | OF_DIFFUSERS)[name](vae)
    encoder = vae.encoder
    with pytest.raises(ValueError, match=rf"the VAE's (\S*\.)?{re.escape(name)}.*: optimise the VAE first"):
        optimize_vae(vae)
    assert vae.encoder is encoder


@pytest.mark.parametrize("name", CHANGES)
def test_layers_that_were_changed_after_adopting_are_not_restored_in_silence(name):
    vae = optimize_vae(small_vae("kl"))
    CHANGES[name](vae)
    encoder = vae.encoder
    with pytest.raises(ValueError, match=rf"the VAE's {re.escape(name)}.*: undo that first"):
        restore_vae(vae)
    assert vae.encoder is encoder


def test_hooks_and_wrappers_are_named_when_a_vae_is_restored():
    vae = optimize_vae(small_vae("kl"))
    handle = vae.decoder.mid_block.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"on the VAE's decoder\.mid_block.*undo that first"):
        restore_vae(vae)
    handle.remove()
    decoder = vae.decoder
    vae.decoder = torch.compile(decoder)
    with pytest.raises(ValueError, match=r"the VAE's decoder is .*OptimizedModule.*undo that first"):
        restore_vae(vae)
    vae.decoder = decoder
    kind = type(small_vae("kl").encoder)
    assert type(restore_vae(vae).encoder) is kind
    assert type(restore_vae(vae).encoder) is kind


@pytest.mark.parametrize("processor", [AttnProcessor, SlicedAttnProcessor])
def test_attention_processors_stay_when_a_vae_is_restored(processor):
    vae = optimize_vae(small_vae("kl"))
    given = {
        name: processor(2) if processor is SlicedAttnProcessor else processor()
        for name in vae.attn_processors
    }
    vae.set_attn_processor(dict(given))
    assert restore_vae(vae).attn_processors == given
    assert optimize_vae(vae).attn_processors == given


def test_processors_of_fused_projections_go_when_a_vae_is_restored():
    """The layers that come back are not fused."""
    vae = optimize_vae(small_vae("kl"))
    x, z = images_for(vae)
    vae.fuse_qkv_projections()
    expected = results(vae, x, z)
    for actual, right in zip(results(restore_vae(vae), x, z), expected, strict=True):
        assert relative_error(actual, right) <= 1e-5


def test_what_changes_no_number_is_adopted():
    """Words for memory and modes, lists for tuples, notes of other libraries, other processors, half precision."""
    vae = small_vae("kl").to(torch.bfloat16).train()
    for module in vae.modules():
        module.note = "mine"
        if isinstance(module, nn.SiLU):
            module.inplace = True
        if isinstance(module, nn.Conv2d):
            module.stride = list(module.stride)
    vae.enable_gradient_checkpointing()
    vae.set_attn_processor(SlicedAttnProcessor(2))
    vae.to(memory_format=torch.channels_last)
    assert type(restore_vae(optimize_vae(vae))) is SMALL["kl"][0]


def test_keys_of_a_derived_class_are_adopted_without_a_warning(caplog):
    vae = small_vae("kl")
    vae.register_to_config(extra=1)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        restore_vae(optimize_vae(vae))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert vae.config["extra"] == 1
