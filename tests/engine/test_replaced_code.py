"""Other paddings, code put in the place of torch's own, and hooks on modules are obeyed, with gradients and without."""

import functools

import pytest
import torch
from stock_pairs import CONFIGS, Z, close, pair
from torch import nn


def circular(self, x, weight, bias):
    return nn.functional.conv2d(nn.functional.pad(x, (1,) * 4, mode="circular"), weight, bias, self.stride)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("change", ["circular", "reflect", "replicate", "_conv_forward", "forward"])
def test_other_paddings_and_replaced_convolutions_are_obeyed(change, grad):
    """Also in channels_last, on maps that training's fused functions are for."""
    results = []
    for vae in pair(CONFIGS["sd"]):
        vae.to(memory_format=torch.channels_last)
        for layer in vae.decoder.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                if change == "_conv_forward":
                    layer._conv_forward = circular.__get__(layer)
                elif change == "forward":
                    layer.forward = lambda x, layer=layer: circular(layer, x, layer.weight, layer.bias)
                else:
                    layer.padding_mode = change
                    layer._reversed_padding_repeated_twice = [1, 1, 1, 1]
        torch.manual_seed(1)
        z = torch.randn(2, 4, 16, 16).to(memory_format=torch.channels_last)
        with torch.set_grad_enabled(grad):
            results.append(vae.decoder(z).detach())
    close(results[1], results[0])


@pytest.mark.parametrize("name", ["_conv_forward", "forward"])
def test_a_class_of_torch_whose_code_was_replaced_is_obeyed(name, monkeypatch, strips):
    reference, vae = pair(CONFIGS["sd"])
    original = getattr(nn.Conv2d, name)
    monkeypatch.setattr(nn.Conv2d, name, lambda self, *args: 2 * original(self, *args))
    with torch.no_grad():
        close(vae.decoder(torch.ones(Z)), reference.decoder(torch.ones(Z)))
    assert not strips


@pytest.mark.parametrize(
    ("kind", "name"),
    [(nn.Conv2d, "_conv_forward"), (nn.Conv2d, "forward"), (nn.GroupNorm, "forward"), (nn.SiLU, "forward")],
)
@pytest.mark.parametrize("grad", [False, True])
def test_replaced_code_that_copies_the_name_of_its_module_is_obeyed(kind, name, grad, monkeypatch, strips):
    sides = pair(CONFIGS["sd"])
    original = getattr(kind, name)

    @functools.wraps(original)
    def scaled(self, *args):
        return 1.5 * original(self, *args)

    z = torch.randn(2, 4, 16, 16).to(memory_format=torch.channels_last)
    for side in sides:
        side.to(memory_format=torch.channels_last)
    monkeypatch.setattr(kind, name, scaled)
    with torch.set_grad_enabled(grad):
        theirs, ours = (side.decoder(z).detach() for side in sides)
    close(ours, theirs)
    assert not strips


def test_hooks_on_all_modules_change_results_with_gradients():
    sides = [side.to(memory_format=torch.channels_last) for side in pair(CONFIGS["sd"])]
    z = torch.randn(2, 4, 16, 16).to(memory_format=torch.channels_last)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, y: 1.5 * y if isinstance(module, nn.GroupNorm) else None
    )
    try:
        theirs, ours = (side.decoder(z).detach() for side in sides)
    finally:
        handle.remove()
    close(ours, theirs)


def test_hooks_on_all_modules_are_heard(strips):
    _, vae = pair(CONFIGS["sd"])
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(type(module)))
    try:
        with torch.no_grad():
            vae.decoder(torch.randn(Z))
    finally:
        handle.remove()
    assert nn.GroupNorm in heard
    assert not strips


def test_backward_hooks_on_a_norm_are_heard():
    _, vae = pair(CONFIGS["sd"])
    vae.to(memory_format=torch.channels_last)
    heard = []
    vae.decoder.up_blocks[0].resnets[0].norm1.register_full_backward_hook(lambda *_: heard.append(1))
    vae.decoder(torch.randn(2, 4, 16, 16).to(memory_format=torch.channels_last)).sum().backward()
    assert heard
