"""What two processes do, for test_two_processes.py: torchrun starts them with the folders of images and results.

Each process writes what it has found to a file of its own; the test compares and judges. Then both train until a
signal ends them.
"""

import runpy
import sys
from pathlib import Path

import torch
from small_runs import everything, recorded, reset, small, start, state, train

TRAIN = Path(__file__).parents[1] / "train/train.py"
LONGER = {"batch_size": 2, "max_steps": 60, "checkpoint_every": 5, "validate_every": 0}  # of TrainConfig


def equality(images: Path, out: Path) -> dict:
    """Whole runs with everything on, of four images a step, without and with accumulation."""
    plain = recorded(everything(small(out / "plain", images, batch_size=2)))
    accumulated = recorded(everything(small(out / "accumulated", images, batch_size=1, accumulation=2)))
    return {"plain": plain, "accumulated": accumulated}


def resume(images: Path, out: Path) -> dict:
    """The plain run again, stopped by a signal that only one process has heard, and resumed."""
    config = everything(small(out / "resumed", images, batch_size=2))
    trainer = start(config)
    train(trainer, stop_at=3 if trainer.accelerator.process_index == 1 else None)
    return {"step": trainer.state.step, "signal": trainer.stopped_by, "record": recorded(config)}


def bad_numbers(images: Path, out: Path) -> dict:
    """A run in which a pixel of one process is not finite in its batches 3 to 5."""
    states, trainer = {}, start(everything(small(out / "bad", images, batch_size=2)))

    def spoil(trainer, micro_batches) -> None:
        states[trainer.state.draw] = state(trainer)
        if trainer.state.draw in (3, 4, 5) and trainer.accelerator.process_index == 1:
            micro_batches[0]["pixels"][0, 0, 0, 0] = torch.nan

    train(trainer, spoil=spoil)
    return {"states": states, "step": trainer.state.step, "draw": trainer.state.draw}


def peace(images: Path, out: Path) -> None:
    """A run that nothing disturbs, against which others are held: trainings as users start them."""
    train(start(small(out / "peace", images, **LONGER)))


def corrupt_images(images: Path, out: Path) -> None:
    """A run over a folder in which some images cannot be read."""
    train(start(small(out / "corrupt", images.with_name("corrupt"), batch_size=2)))


def main(images: Path, out: Path, only: str | None = None) -> None:
    torch.set_num_threads(1)
    if only == "peace":
        peace(images, out)
        return
    cases = (equality, resume, bad_numbers, corrupt_images)
    found = {case.__name__: case(images, out) for case in cases}
    torch.save(found, out / f"found-{torch.distributed.get_rank()}.pt")
    reset()
    sys.argv = [str(TRAIN), "--config", str(out / "signal.yaml")]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
