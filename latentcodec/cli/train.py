"""`latentcodec train`: the same as `accelerate launch train/train.py`, in one process."""

from __future__ import annotations

import typer


def train(context: typer.Context) -> int:
    """Train a codec on your own pictures. --help lists every setting.

        latentcodec train --config train/configs/photo-f8c16.yaml --output_dir runs/mine --data.path photos

    For several GPUs: accelerate launch -m latentcodec train ... or torchrun -m latentcodec train ...
    """
    from latentcodec.training.loop import main

    return main(context.args, "latentcodec train")
