"""What a run remembers: everything that a step changes, written to a checkpoint and taken back from one.

Weights, moving average, optimizer states and a few numbers. There is no random state among them, since every draw
is a function of (seed, position in the stream); see `randomness.py`. How files are committed is in `checkpoint.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from latentcodec.training import checkpoint as checkpoints
from latentcodec.training.optim.schedule import load_optimizer
from latentcodec.training.preflight import fixed_settings

if TYPE_CHECKING:
    from latentcodec.training.trainer import Trainer


def save(trainer: Trainer) -> None:
    """Commit a checkpoint of the trainer as it is; for the main process alone. Raises CheckpointError."""
    tensors = {"model": trainer.codec.state_dict(), "ema": trainer.ema.state_dict()}
    objects: dict[str, Any] = {"optimizer": trainer.optimizer.state_dict()}
    state = {
        **fixed_settings(trainer.config),
        "draw": trainer.draw,
        "seconds": trainer.seconds,
        "rate": trainer.objective.rate.numbers(),
        "config": asdict(trainer.config),
        "machine": trainer.hardware.record(),
    }
    if trainer.adversary is not None:
        tensors["discriminator"] = trainer.adversary.state_dict()
        objects["discriminator_optimizer"] = trainer.adversary.optimizer.state_dict()
        state["adversary"] = trainer.adversary.numbers()
    if trainer.accelerator.scaler is not None:
        state["scaler"] = trainer.accelerator.scaler.state_dict()
    checkpoints.save(
        trainer.output / "checkpoints",
        trainer.step,
        tensors=tensors,
        objects=objects,
        state=state,
        keep_last=trainer.config.train.keep_last,
    )


def load(trainer: Trainer, saved: checkpoints.Checkpoint) -> None:
    """Take back what training moves, and the step; the place in the stream and the time are left to the caller."""
    model = saved.tensors("model")
    if not trainer.config.loss.learn_scale:
        model["log_scale"] = trainer.codec.log_scale.detach()  # a setting like the weights of the losses
    trainer.codec.load_state_dict(model)
    trainer.ema.load_state_dict(saved.tensors("ema"))
    load_optimizer(trainer.optimizer, saved.object("optimizer"))
    trainer.objective.rate.load(saved.state["rate"])
    if trainer.adversary is not None:
        trainer.adversary.load(saved)
    # A run that changes to fp16 on its way has saved no scale yet and looks for it as a new one does.
    if trainer.accelerator.scaler is not None and "scaler" in saved.state:
        trainer.accelerator.scaler.load_state_dict(saved.state["scaler"])
    trainer.step = trainer.committed = saved.step
