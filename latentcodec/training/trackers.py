"""What Accelerate's trackers get beside numbers: sample pictures and alerts. Each library has its own call for them.

Accelerate passes on numbers to any tracker; pictures and alerts go to TensorBoard, W&B and trackio, others go without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

TITLE = "latents"


def show_pictures(trackers: Iterable[Any], picture: NDArray[np.uint8], step: int) -> None:
    """A picture [H, W, C], C 1, 3 or 4, as "samples" at `step`."""
    for tracker in trackers:
        match tracker.name:
            case "tensorboard":
                tracker.log_images({"samples": picture[None]}, step=step, dataformats="NHWC")
            case "wandb":
                tracker.log_images({"samples": picture[None]}, step=step)
            case "trackio":
                import trackio

                shown = picture[..., 0] if picture.shape[-1] == 1 else picture
                tracker.log({"samples": trackio.Image(shown)}, step=step)


def alert(trackers: Iterable[Any], text: str, failure: bool, step: int) -> None:
    """Something to look at; a failure is more urgent than a warning. TensorBoard has no alerts and gets it as text."""
    for tracker in trackers:
        match tracker.name:
            case "tensorboard":
                tracker.writer.add_text(TITLE, text, global_step=step)
            case "wandb":
                tracker.run.alert(title=TITLE, text=text, level="ERROR" if failure else "WARN")
            case "trackio":
                from trackio import AlertLevel

                level = AlertLevel.ERROR if failure else AlertLevel.WARN
                tracker.run.alert(title=TITLE, text=f"step {step}: {text}", level=level)
