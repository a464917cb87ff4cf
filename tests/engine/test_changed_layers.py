"""Layers that users change after adopting give the numbers of diffusers' class, and refuse nothing that it takes."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from stock_pairs import config, pair
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "vae"))
from small_vaes import CAUSAL_NAMES, relative_error, small_vae

from latentcodec import optimize_vae
from latentcodec.adopt import adopt
from latentcodec.ops.native.build import library

CONFIG = config(channels=(16, 32), groups=4, mid_block_add_attention=False)
CONV = "decoder.mid_block.resnets.0.conv1"


def replaced(name, make):
    """Another layer in place of the one of that name."""

    def change(vae):
        module, _, leaf = name.rpartition(".")
        setattr(vae.get_submodule(module), leaf, make())

    return change


def set_to(name, **attributes):
    return lambda vae: vae.get_submodule(name).__dict__.update(attributes)


def with_values(name, make):
    """Values of another layout behind the same parameter."""

    def change(vae):
        module, _, leaf = name.rpartition(".")
        parameter = vae.get_submodule(module).get_parameter(leaf)
        parameter.data = make(parameter.data)

    return change


def swapped(vae):
    weight = vae.get_submodule(CONV).weight
    torch.utils.swap_tensors(weight, nn.Parameter(torch.randn_like(weight) * 0.1))


def swapped_by_loading(vae):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        vae.load_state_dict({key: value * 1.5 for key, value in vae.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES = {
    "a convolution without padding": set_to("decoder.conv_in", padding=(0, 0)),
    "a convolution with more padding": set_to("decoder.conv_in", padding=(2, 2)),
    "padding that moves to the next convolution": lambda vae: (
        set_to(CONV, padding=(0, 0))(vae),
        set_to(CONV.replace("conv1", "conv2"), padding=(2, 2))(vae),
    ),
    "a sequence as first layer": lambda vae: (
        replaced("decoder.conv_in", lambda: nn.Sequential(nn.Conv2d(4, 32, 3, padding=1)))(vae),
        nn.Module.to(vae, "cpu"),
    ),
    "a stride": set_to("decoder.conv_out", stride=(2, 2)),
    "padding on top of the class's": set_to("encoder.down_blocks.0.downsamplers.0.conv", padding=(1, 1)),
    "a 5x5 convolution": replaced("decoder.conv_out", lambda: nn.Conv2d(16, 3, 5, padding=2)),
    "a 1x1 convolution": replaced("decoder.conv_out", lambda: nn.Conv2d(16, 3, 1)),
    "a 3x1 convolution": replaced("decoder.conv_out", lambda: nn.Conv2d(16, 3, (3, 1), padding=(1, 0))),
    "padding in words": replaced("decoder.conv_out", lambda: nn.Conv2d(16, 3, 3, padding="same")),
    "no bias": replaced("decoder.conv_out", lambda: nn.Conv2d(16, 3, 3, padding=1, bias=False)),
    "a 5x5 upsampler": replaced(
        "decoder.up_blocks.0.upsamplers.0.conv", lambda: nn.Conv2d(32, 32, 5, padding=2)
    ),
    "a norm without weights": replaced("decoder.conv_norm_out", lambda: nn.GroupNorm(4, 16, affine=False)),
    "the other GELU": replaced("decoder.conv_act", lambda: nn.GELU(approximate="tanh")),
    "no upsamplers": replaced("decoder.up_blocks.0.upsamplers", lambda: None),
    "an expanded weight": with_values(f"{CONV}.weight", lambda w: torch.randn(3, 3).mul(0.1).expand_as(w)),
    "a transposed weight": with_values(f"{CONV}.weight", lambda w: w.transpose(0, 1)),
    "a bias with gaps": with_values(f"{CONV}.bias", lambda b: torch.randn(2 * len(b))[::2]),
    "an expanded bias": with_values(f"{CONV}.bias", lambda b: torch.ones(1).expand_as(b)),
    "swapped tensors": swapped,
    "tensors swapped by load_state_dict": swapped_by_loading,
}


@torch.no_grad()
def results(vae, seed):
    torch.manual_seed(seed)
    x, z = torch.rand(2, 3, 44, 36) * 2 - 1, torch.randn(2, 4, 22, 18)
    return vae.encode(x).latent_dist.parameters, vae.decode(z).sample


@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_was_changed_gives_the_numbers_of_the_class(name):
    assert library() is not None
    sides = pair(CONFIG)
    optimize_vae(sides[1])
    for _ in range(3):  # the last is replayed from a recording
        results(sides[1], 0)
    for side in sides:
        torch.manual_seed(1)
        CHANGES[name](side)
    for seed in (1, 2, 3):
        for theirs, ours in zip(*(results(side, seed) for side in sides), strict=True):
            assert relative_error(ours, theirs) <= 2e-5


@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_was_changed_gives_the_numbers_of_the_class_with_gradients(name):
    """In channels_last, where functions of ours compute in place of layers."""
    assert library() is not None
    sides = pair(CONFIG)
    optimize_vae(sides[1])
    outcomes = []
    for side in sides:
        torch.manual_seed(1)
        CHANGES[name](side.to(memory_format=torch.channels_last))
        torch.manual_seed(2)
        x, z = torch.rand(2, 3, 44, 36) * 2 - 1, torch.randn(2, 4, 22, 18)
        x, z = (value.to(memory_format=torch.channels_last).requires_grad_() for value in (x, z))
        y = side.encode(x).latent_dist.parameters, side.decode(z).sample
        outcomes.append([*y, *torch.autograd.grad([value.square().mean() for value in y], (x, z))])
    for theirs, ours in zip(*outcomes, strict=True):
        assert relative_error(ours, theirs) <= 1e-4


def test_a_stride_that_the_class_cannot_add_up_is_torchs_own_error_with_gradients():
    for vae in pair(CONFIG):
        vae.to(memory_format=torch.channels_last)
        set_to(CONV.replace("conv1", "conv2"), stride=(2, 2), padding=(0, 0))(vae)
        with pytest.raises(RuntimeError, match="must match the size"):
            vae.decode(torch.randn(2, 4, 22, 18).to(memory_format=torch.channels_last))


def test_a_shortcut_that_is_missing_is_torchs_own_error():
    """Not a sum over memory of another width."""
    _, vae = pair(CONFIG)
    vae.decoder.up_blocks[1].resnets[0].conv_shortcut = None
    with torch.no_grad(), pytest.raises(RuntimeError, match="must match the size"):
        vae.decode(torch.randn(2, 4, 22, 18))


def test_the_last_stages_have_no_samplers_as_in_diffusers():
    for vae in pair(CONFIG):
        assert vae.encoder.down_blocks[-1].downsamplers is None
        assert vae.decoder.up_blocks[-1].upsamplers is None


@pytest.mark.parametrize("part", ["encoder", "decoder", "quant_conv", "post_quant_conv", "decoder.conv_out"])
@pytest.mark.parametrize("name", CAUSAL_NAMES)
def test_replaced_modules_of_classes_with_frames_count(name, part):
    reference = small_vae(name)
    vae, other = adopt(copy.deepcopy(reference)), small_vae(name)
    for side in (reference, vae):
        replaced(part, lambda: other.get_submodule(part))(side)
    x = torch.rand(1, small_vae(name)._modules["encoder"].conv_in.weight.shape[1], 1, 32, 32)
    if name == "wan22":
        x = torch.rand(1, 3, 1, 32, 32)
    z = torch.randn(1, 4, 1, 2, 2)
    with torch.no_grad():
        theirs, ours = ((s.encode(x).latent_dist.parameters, s.decode(z).sample) for s in (reference, vae))
    for expected, actual in zip(theirs, ours, strict=True):
        assert relative_error(actual, expected) <= 2e-5
