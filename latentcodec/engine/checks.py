"""Whether modules are still what they were built as, so that other code may compute in their place.

Hooks, adapters, wrappers and layers with other settings are what users add to a network; where there are any, the
plain modules run.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from latentcodec.vae.layers import ACTIVATIONS

LAYERS = {nn.ModuleList, nn.Conv2d, nn.Linear, nn.GroupNorm, *ACTIVATIONS.values()}
"""The types of layers without children that the engine can compute; a module list may be empty."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward hook is on the module, or a `forward` of its own was set on the object."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


def modules_within(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all inside it; runs at every call, so without the names and the memory of `Module.modules`."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from modules_within(child)


def is_plain(module: nn.Module, blocks: set[type[nn.Module]]) -> bool:
    """Whether a module is what it was built as: a layer, or one of `blocks`; no adapter, no wrapper, no hook."""
    if has_hooks(module):
        return False
    if isinstance(module, nn.Conv2d) and not is_plain_convolution(module):
        return False
    return type(module) in (blocks if module._modules else LAYERS)


def is_plain_convolution(layer: nn.Conv2d) -> bool:
    """Whether zeros are padded, nothing is dilated or grouped, and the computation was not replaced."""
    settings = layer.padding_mode, layer.dilation, layer.groups
    return settings == ("zeros", (1, 1), 1) and "_conv_forward" not in layer.__dict__
