"""One network takes over the parameters, and what else users may have set, of another with the same names.

What it cannot take over, changed layers and hooks, is refused.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from latentcodec.engine.checks import has_hooks
from latentcodec.vae.layers import Attention

NOT_COMPARED = {
    "training",
    "gradient_checkpointing",
    "padding_mode",
    "processor",
    "equal_processors",
    "inplace",
}
"""The settings of modules that are handed on, or that change no number."""


def require_as_built(network: nn.Module, fresh: nn.Module, part: str, cure: str) -> None:
    """Raise ValueError, naming the layer of `network` that is not as in `fresh`, which was just built for its config.

    `part` is the network's name in the VAE, `cure` what to do.
    """
    expected = dict(fresh.named_modules(remove_duplicate=False))
    found: dict[str, tuple[nn.Module, nn.Module | None]] = {
        ".".join(filter(None, (part, name))): (module, expected.get(name))
        for name, module in network.named_modules(remove_duplicate=False)
    }
    for name, (module, built) in found.items():
        if type(module) is not type(built):
            raise ValueError(f"the VAE's {name} is {type(module)}, where its class has {type(built)}: {cure}")
        if has_hooks(module) or "_conv_forward" in module.__dict__:
            raise ValueError(
                f"a hook, or a forward of its own, is on the VAE's {name}, and would be lost: {cure}"
            )
    require_parameters_of(fresh, network, cure)
    for name, (module, built) in found.items():
        for key, value in _settings(built).items():
            given = vars(module).get(key, value)
            given = tuple(given) if isinstance(given, list) else given
            if not _is_simple(given) or given != value:
                raise ValueError(
                    f"the VAE's {name}.{key} is {given!r}, where its class has {value!r}: {cure}"
                )


def _settings(module: nn.Module | None) -> dict[str, Any]:
    """The public attributes of a module that are numbers, words, or tuples of these."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in NOT_COMPARED and _is_simple(value)
    }


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_simple, value))
    return value is None or isinstance(value, bool | int | float | str)


def require_parameters_of(ours: nn.Module, theirs: nn.Module, cure: str) -> None:
    """Raise ValueError where `theirs` has not the parameters that `ours` was built with from the configuration."""
    parameters = dict(theirs.named_parameters())
    expected = {name: parameter.shape for name, parameter in ours.named_parameters()}
    if {name: parameter.shape for name, parameter in parameters.items()} != expected:
        differing = sorted(set(expected).symmetric_difference(parameters)) or sorted(
            name for name in expected if expected[name] != parameters[name].shape
        )
        raise ValueError(
            f"the VAE's parameters are not those of its config, first at {differing[0]!r}: {cure}"
        )


def take_over(new: Any, old: Any, processors: tuple[type, ...]) -> None:
    """Let `new`, which has the parameters' names of `old`, become what that is: parameters, processors, settings."""
    for name, parameter in old.named_parameters():
        module, _, leaf = name.rpartition(".")
        new.get_submodule(module).register_parameter(leaf, parameter)
    share_processors(new, old, processors)
    share_paddings(new, old)
    new.train(old.training)
    new.gradient_checkpointing = old.gradient_checkpointing
    if old.gradient_checkpointing:
        new._gradient_checkpointing_func = old._gradient_checkpointing_func


def share_processors(new: nn.Module, old: nn.Module, processors: tuple[type, ...]) -> None:
    """`attn_processors` of the VAE lists the same objects, under the same names, as before.

    `processors` are the classes of those that the new layers can compute by. Ours refuse others; a layer of diffusers'
    keeps its own for them.
    """
    for name, module in new.named_modules():
        if isinstance(module, Attention):
            module.equal_processors = processors
            module.set_processor(old.get_submodule(name).processor)
    for name, module in old.named_modules():
        if isinstance(module, Attention) and type(module.processor) in processors:
            cast(Attention, new.get_submodule(name)).set_processor(module.processor)


def share_paddings(new: nn.Module, old: nn.Module) -> None:
    """Convolutions pad as before: people set other modes than zeros on them, for textures without seams."""
    for name, module in old.named_modules():
        if isinstance(module, nn.Conv2d):
            cast(nn.Conv2d, new.get_submodule(name)).padding_mode = module.padding_mode
