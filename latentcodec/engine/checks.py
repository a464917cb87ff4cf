"""Whether modules are still what they were built as, so that other code may compute in their place.

Hooks, adapters, wrappers and layers with other settings are what users add to a network; where there are any, the
plain modules run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.modules.module as all_modules
from torch import Tensor, nn

from latentcodec.vae.layers import ACTIVATIONS

LAYERS: set[type[nn.Module]] = {nn.ModuleList, nn.Conv2d, nn.Linear, nn.GroupNorm, *ACTIVATIONS.values()}
"""The types of layers without children that the engine can compute; a module list may be empty."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook is on the module, or a `forward` of its own was set on the object."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks or module._backward_hooks or module._backward_pre_hooks) or "forward" in module.__dict__


def torch_layers_are_replaced() -> bool:
    """Whether a library has put its own code into torch's layers, or hooks into all modules of the process."""
    hooks = all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks
    return (
        bool(hooks or all_modules._global_backward_hooks or all_modules._global_backward_pre_hooks)
        or any(layer.forward.__module__ != layer.__module__ for layer in LAYERS - {nn.ModuleList})
        or nn.Conv2d._conv_forward.__module__ != nn.Conv2d.__module__
    )


def has_plain_parameters(module: nn.Module) -> bool:
    """Whether no parameter of the module itself is of a tensor subclass, as quantised, sharded and fake ones are."""
    return all(type(p) in (nn.Parameter, Tensor) for p in module._parameters.values() if p is not None)


def modules_within(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all inside it; runs at every call, so without the names and the memory of `Module.modules`."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from modules_within(child)


def is_plain(module: nn.Module, blocks: set[type[nn.Module]]) -> bool:
    """Whether a module is what it was built as: a layer, or one of `blocks`; no adapter, no wrapper, no hook."""
    if has_hooks(module) or not has_plain_parameters(module):
        return False
    if isinstance(module, nn.Conv2d) and not is_plain_convolution(module):
        return False
    return type(module) in (blocks if module._modules else LAYERS)


def is_plain_convolution(layer: nn.Conv2d) -> bool:
    """Whether zeros are padded, nothing is dilated or grouped, and the computation was not replaced."""
    settings = layer.padding_mode, layer.dilation, layer.groups
    return settings == ("zeros", (1, 1), 1) and "_conv_forward" not in layer.__dict__
