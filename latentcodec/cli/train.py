"""`latentcodec train`: the same as `accelerate launch train/train.py`, in one process."""

from __future__ import annotations

import os

import typer


def train(context: typer.Context) -> int:
    """Train a codec on your own pictures. --help lists every setting.

        latentcodec train --config train/configs/photo-f8c16.yaml --output_dir runs/mine --data.path photos

    For several GPUs: accelerate launch -m latentcodec train ... or torchrun -m latentcodec train ...
    """
    from latentcodec.openmp import wait_briefly
    from latentcodec.training.console import end_at_interrupt, ticking

    end_at_interrupt()
    wait_briefly()
    with ticking("loading PyTorch and diffusers", shown=os.environ.get("RANK", "0") == "0"):
        from latentcodec.training.loop import main

    return main(context.args, "latentcodec train")
