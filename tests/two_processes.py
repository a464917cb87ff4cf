"""What two processes do, for test_train.py; started by torchrun, with the folders of the images and of the results.

Each process writes what it has found to its own file: the test reads, compares and judges.
"""

import sys
from pathlib import Path

import torch
from small_runs import everything, recorded, small, start, state, train



def equality(images: Path, out: Path) -> dict:
    """Whole runs with everything on, of four images a step, without and with accumulation."""
    plain = recorded(everything(small(out / "plain", images, batch_size=2)))
    accumulated = recorded(everything(small(out / "accumulated", images, batch_size=1, accumulation=2)))
    return {"plain": plain, "accumulated": accumulated}


def resume(images: Path, out: Path) -> dict:
    """The plain run again, stopped by a signal that only one process has heard, and resumed."""
    config = everything(small(out / "resumed", images, batch_size=2))
    trainer = start(config)
    only_one = 3 if trainer.accelerator.process_index == 1 else None
    train(trainer, stop_at=only_one)
    stopped = {"step": trainer.step, "signal": trainer.stopped_by}
    return stopped | {"record": recorded(config)}


def bad_numbers(images: Path, out: Path) -> dict:
    """A run in which the pixels of one process are not finite in its third to fifth batch."""
    states, trainer = {}, start(everything(small(out / "bad", images, batch_size=2)))

    def spoil(trainer, micro_batches) -> None:
        states[trainer.draw] = state(trainer)
        if trainer.draw in (3, 4, 5) and trainer.accelerator.process_index == 1:
            micro_batches[0]["pixels"][0, 0, 0, 0] = torch.nan

    train(trainer, spoil=spoil)
    return {"states": states, "step": trainer.step, "draw": trainer.draw}


def corrupt_images(images: Path, out: Path) -> None:
    """A run over a folder in which some images cannot be read."""
    train(start(small(out / "corrupt", images.with_name("corrupt"), batch_size=2)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    images, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = {case.__name__: case(images, out) for case in (equality, resume, bad_numbers, corrupt_images)}
    rank = torch.distributed.get_rank()
    torch.save(found, out / f"found-{rank}.pt")
    torch.distributed.destroy_process_group()
