"""Padding modes other than zeros: the numbers of diffusers' own class, in strips and with gradients."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "vae"))
from small_vaes import relative_error, small_vae
from stock_pairs import ALL_MAPS

from latentcodec.adopt import adopt, restore_vae
from latentcodec.engine import plan
from latentcodec.engine.plan import Engine
from latentcodec.engine.strips import StripPass

MODES = ("reflect", "replicate", "circular")


def padded_vae(name, mode, only=None):
    vae = small_vae(name)
    for key, layer in vae.named_modules():
        if isinstance(layer, nn.Conv2d) and (only is None or only in key):
            layer.padding_mode = mode
    return vae


@pytest.mark.parametrize("map_bytes", [ALL_MAPS, 0], ids=["kept", "made again"])
@pytest.mark.parametrize("strip_bytes", [1, 3000, 1 << 22])
@pytest.mark.parametrize("size", [(16, 16), (45, 27)])
@pytest.mark.parametrize("mode", MODES)
def test_every_padding_mode_equals_the_class_at_every_strip_height(
    mode, size, strip_bytes, map_bytes, monkeypatch
):
    monkeypatch.setitem(plan.STRIP_BYTES, "cpu", strip_bytes)
    make = Engine._plan
    monkeypatch.setattr(Engine, "_plan", lambda *given: replace(make(*given), map_bytes=map_bytes))
    strips = []
    for name in ("encode", "decode"):
        run = getattr(StripPass, name)
        monkeypatch.setattr(StripPass, name, lambda *given, run=run: strips.append(1) or run(*given))
    vae = padded_vae("kl", mode)
    x, z = torch.rand(2, 3, *size) * 2 - 1, torch.randn(2, 4, size[0] // 8, size[1] // 8)
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
        plain = small_vae("kl")
        plain.load_state_dict(vae.state_dict())
        assert relative_error(plain.decode(z).sample, expected[1]) > 1e-3  # the mode matters
        adopt(vae)
        assert relative_error(vae.encode(x).latent_dist.parameters, expected[0]) <= 1e-5
        assert relative_error(vae.decode(z).sample, expected[1]) <= 1e-5
    assert len(strips) == 2


@pytest.mark.parametrize("mode", ["replicate", "circular"])  # torch refuses to mirror one row
def test_one_cell_that_pads_with_itself_gives_the_numbers_of_the_class(mode):
    vae = padded_vae("kl", mode)
    x, z = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 4, 1, 1)
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
        adopt(vae)
        for _ in range(3):  # a recording would be replayed by then
            assert relative_error(vae.encode(x).latent_dist.parameters, expected[0]) <= 1e-5
            assert relative_error(vae.decode(z).sample, expected[1]) <= 1e-5


@pytest.mark.parametrize("only", ["upsamplers", "conv1", "conv_in", "conv_out"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_may_differ_between_layers(mode, only, monkeypatch):
    monkeypatch.setitem(plan.STRIP_BYTES, "cpu", 1)
    vae = padded_vae("flux2", mode, only)
    z = torch.randn(1, 4, 6, 5)
    with torch.no_grad():
        expected = vae.decode(z).sample
        assert relative_error(adopt(vae).decode(z).sample, expected) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_every_padding_mode_equal_those_of_the_class(mode):
    vae = padded_vae("kl", mode).to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, 64, 48).to(memory_format=torch.channels_last)
    gradients = []
    for _ in range(2):
        vae.zero_grad()
        vae(x).sample.square().mean().backward()
        gradients.append({key: p.grad.clone() for key, p in vae.named_parameters()})
        adopt(vae)
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    errors = [(gradients[1][key] - value).abs().max() / largest for key, value in gradients[0].items()]
    assert max(errors) <= 5e-5  # the class itself is as far from float64
    restore_vae(vae)
    modes = {layer.padding_mode for layer in vae.modules() if isinstance(layer, nn.Conv2d)}
    assert modes == {mode}
