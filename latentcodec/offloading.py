"""VAEs whose weights are elsewhere between passes: offloaded by Accelerate or by diffusers, as pipelines ask for it."""

from __future__ import annotations

from typing import Any

import torch


def computing_device(vae: Any) -> torch.device:
    """Where a pass runs: where a hook of Accelerate moves the weights to, else where they are."""
    for module in vae.modules() if hasattr(vae, "_hf_hook") else ():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):  # several hooks may be in one
            if (device := getattr(part, "execution_device", None)) is not None:
                return torch.device(device)
    device = vae.device
    assert isinstance(device, torch.device)
    return device


def is_offloaded(vae: Any) -> bool:
    """By Accelerate, whose hook is on the model, or by diffusers in groups, whose hooks are on its layers."""
    registries = [getattr(module, "_diffusers_hook", None) for module in vae.modules()]
    in_groups = any(found is not None and found.get_hook("group_offloading") for found in registries)
    return in_groups or hasattr(vae, "_hf_hook")


def require_here(vae: Any, what: str) -> None:
    """Raises ValueError, naming `what` and the first weight, for weights that are offloaded."""
    if away := [name for name, value in vae.state_dict().items() if value.device.type == "meta"]:
        raise ValueError(f"{what}, for {away[0]} is offloaded; do it before offloading")
