"""One network takes over the parameters, and what else users may have set, of another with the same names."""

from __future__ import annotations

from typing import cast

from torch import nn

from latentcodec.vae.layers import Attention


def share_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    """Register the parameters of `theirs` in `ours`, under the same names."""
    require_parameters_of(ours, theirs)
    for name, parameter in theirs.named_parameters():
        module, _, leaf = name.rpartition(".")
        ours.get_submodule(module).register_parameter(leaf, parameter)


def require_parameters_of(ours: nn.Module, theirs: nn.Module) -> None:
    """Raise ValueError where `theirs` has not the parameters that `ours` was built with from the configuration."""
    parameters = dict(theirs.named_parameters())
    expected = {name: parameter.shape for name, parameter in ours.named_parameters()}
    if {name: parameter.shape for name, parameter in parameters.items()} != expected:
        differing = sorted(set(expected).symmetric_difference(parameters)) or sorted(
            name for name in expected if expected[name] != parameters[name].shape
        )
        raise ValueError(
            f"the VAE's parameters are not those of its config, first at {differing[0]!r}: adopt it before adding "
            "adapters or replacing layers"
        )


def share_processors(new: nn.Module, old: nn.Module, equal: tuple[type, ...]) -> None:
    """`attn_processors` of the VAE lists the same objects, under the same names, as before; `equal` are the classes of
    processors that compute what our layer computes."""
    for name, module in new.named_modules():
        if isinstance(module, Attention):
            module.equal_processors = equal
            module.set_processor(old.get_submodule(name).processor)


def share_paddings(new: nn.Module, old: nn.Module) -> None:
    """Convolutions pad as before: people set other modes than zeros on them, for textures without seams."""
    for name, module in old.named_modules():
        if isinstance(module, nn.Conv2d):
            cast(nn.Conv2d, new.get_submodule(name)).padding_mode = module.padding_mode
