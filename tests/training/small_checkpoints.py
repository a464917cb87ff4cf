"""Checkpoints of a few weights that follow from their step, and whether one is there whole."""

from pathlib import Path

import torch
from torch import Tensor

from latentcodec.training.checkpoint import Checkpoint, save

FILES = ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "manifest.json"]


def weights(step: int) -> dict[str, Tensor]:
    """The weights that a run has at this step."""
    value = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(step))
    return {
        "conv.weight": value.contiguous(memory_format=torch.channels_last),
        "conv.bias": value[:, 0, 0, 0],
    }


def save_step(folder: Path, step: int, keep_last: int = 2) -> Path:
    ema = {name: value / 2 for name, value in weights(step).items()}
    moments = {"state": {0: {"step": torch.tensor(step), "exp_avg": weights(step)["conv.weight"]}}}
    return save(
        folder,
        step,
        tensors={"model": weights(step), "ema": ema},
        objects={"optimizer": moments},
        state={"images_seen": 16 * step, "model": {"channels": (4, 8)}},
        keep_last=keep_last,
    )


def assert_whole(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    for name, value in weights(step).items():
        assert torch.equal(checkpoint.tensors("model")[name], value)
        assert torch.equal(checkpoint.tensors("ema")[name], value / 2)
    moments = checkpoint.object("optimizer")["state"][0]
    assert torch.equal(moments["exp_avg"], weights(step)["conv.weight"])
    assert checkpoint.state == {"images_seen": 16 * step, "model": {"channels": [4, 8]}, "step": step}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
