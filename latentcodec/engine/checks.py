"""Whether modules are still what they were built as, so that other code may compute in their place.

Hooks, adapters, wrappers and layers with other settings are what users add to a network; where there are any, the
plain modules run.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
import torch.nn.modules.module as all_modules
from torch import Tensor, nn

from latentcodec.vae.layers import ACTIVATIONS
from latentcodec.vae.padding import PADDING_MODES

LAYERS: set[type[nn.Module]] = {nn.ModuleList, nn.Conv2d, nn.Linear, nn.GroupNorm, *ACTIVATIONS.values()}
"""The types of layers without children that the engine can compute; a module list may be empty."""

FORM = ("kernel_size", "stride", "padding", "_padding", "approximate")
"""The attributes of layers, beside the shapes of their parameters, that are for their constructors to set."""

SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "padding_mode"),
    nn.GroupNorm: ("num_groups", "eps"),
}
"""The attributes of layers that a pass reads, and that may be set after the network was built."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook is on the module, or a `forward` of its own was set on the object."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks or module._backward_hooks or module._backward_pre_hooks) or "forward" in module.__dict__


def torch_layers_are_replaced() -> bool:
    """Whether a library has put its own code into torch's layers, or hooks into all modules of the process."""
    hooks = all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks
    return (
        bool(hooks or all_modules._global_backward_hooks or all_modules._global_backward_pre_hooks)
        or any(_is_of_others(layer, layer.forward) for layer in LAYERS if layer is not nn.ModuleList)
        or _is_of_others(nn.Conv2d, nn.Conv2d._conv_forward)
    )


def _is_of_others(layer: type[nn.Module], method: Any) -> bool:
    """Whether a method was not written where its class was; `functools.wraps` copies the name of that module."""
    return method.__module__ != layer.__module__ or hasattr(method, "__wrapped__")


def has_plain_parameters(module: nn.Module) -> bool:
    """Whether no parameter of the module itself is of a tensor subclass, as quantised, sharded and fake ones are, and
    none is expanded or has gaps: native functions read memory from end to end."""
    return all(
        type(p) in (nn.Parameter, Tensor) and (p.is_contiguous() or _is_dense(p))
        for p in module._parameters.values()
        if p is not None
    )


def _is_dense(x: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(x))


def form(module: nn.Module) -> tuple[Any, ...]:
    """What a module was built as: its type, the shapes of its parameters (None for one that it lacks), and `FORM`."""
    values = module.__dict__
    shapes = [None if p is None else p.shape for p in values["_parameters"].values()]
    return type(module), shapes, *map(values.get, FORM)


def forms_within(module: nn.Module) -> list[tuple[Any, ...]]:
    """The forms of the module and of all inside it, to be compared with those that it was built with."""
    return [form(part) for part in modules_within(module)]


def modules_within(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all inside it; runs at every call, so without the names and the memory of `Module.modules`."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from modules_within(child)


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """The type of a module and its `SETTINGS`, which a recorded pass has fixed."""
    values = module.__dict__
    return type(module), *[values[name] for name in SETTINGS.get(type(module), ())]


def is_plain(module: nn.Module, blocks: set[type[nn.Module]]) -> bool:
    """Whether a module is what it was built as: a layer, or one of `blocks`; no adapter, no wrapper, no hook."""
    if has_hooks(module) or not has_plain_parameters(module):
        return False
    if isinstance(module, nn.Conv2d) and not is_plain_convolution(module, PADDING_MODES):
        return False
    return type(module) in (blocks if module._modules else LAYERS)


def is_unchanged(module: nn.Module, types: frozenset[type[nn.Module]]) -> bool:
    """Whether a module of a network that is made of `types` is as it was built, and drops no values."""
    if has_hooks(module) or type(module) not in types or not has_plain_parameters(module):
        return False
    if isinstance(module, nn.Dropout):
        return not (module.training and module.p)
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        settings = module.padding_mode, set(module.dilation), module.groups
        return settings == ("zeros", {1}, 1) and "_conv_forward" not in module.__dict__
    return True


def is_plain_convolution(layer: nn.Conv2d, paddings: Container[str] = ("zeros",)) -> bool:
    """Whether padding is one of `paddings`, nothing is dilated or grouped, and the computation was not replaced."""
    settings = layer.dilation, layer.groups
    replaced = "_conv_forward" in layer.__dict__
    return layer.padding_mode in paddings and settings == ((1, 1), 1) and not replaced
