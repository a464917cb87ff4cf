"""The loop of a training run, and how a run begins and ends: one function for every command, bench and test.

`main` is all of `train/train.py` and of `latentcodec train`: it reads the configuration and trains. Its exit codes:

    0    the run is complete
    1    it failed: no disk space, weights that do not recover, a broken data source
    2    a setting is wrong, or an input does not fit: one line names the key, the file or the folder
    3    it is complete, but images were left out: rejects.jsonl lists them
    128 + signal    it was asked to stop and has saved a checkpoint: 143 SIGTERM, 130 Ctrl-C, 138 SIGUSR1

With several processes a complete run ends with 0 even if images were left out: a launcher takes any other code for a
crash of that process, and stops or restarts the others.
"""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import closing

from latentcodec.finite import NotFinite
from latentcodec.sources.encoded import SourceFailed
from latentcodec.training.config import Config, parse
from latentcodec.training.console import end_at_interrupt, refreshed, report_error, survive_broken_streams
from latentcodec.training.signals import StopRequest, exit_code
from latentcodec.training.trainer import Diverged, Trainer
from latentcodec.training.watchdog import watching

DONE, FAILED, WRONG, LOOK = 0, 1, 2, 3  # exit codes
# Of a path that somebody gave and that is not there, or is not what it should be.
WRONG_PATH = {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}

# What torch says of a process that is gone -> what that means and what to do.
GOES_ON = "the same command goes on from the last checkpoint"
LOST_WORKER = (
    "a data worker was ended from outside, as systems do that are short of memory: lower data.workers or "
    f"data.prefetch; {GOES_ON}"
)
LOST = {
    "DataLoader worker": LOST_WORKER,
    "Pin memory thread exited": LOST_WORKER,  # which reads what a worker sends, where a GPU trains
    "Connection closed by peer": f"another process of the run has ended, whose own words say why; {GOES_ON}",
    "Connection reset by peer": f"another process of the run has ended, whose own words say why; {GOES_ON}",
}


def main(arguments: Sequence[str] | None = None, program: str = "train/train.py") -> int:
    """Train as the command line says; returns the exit code. `arguments`: those of the process where none are given.

    What a user can mend is one line on stderr; everything else keeps its traceback.
    """
    survive_broken_streams()
    end_at_interrupt()
    config = parse(arguments, program)
    try:
        return run(config, StopRequest())
    except (Diverged, NotFinite, SourceFailed) as error:
        report_error(error)
        return FAILED
    except (ValueError, OSError) as error:
        report_error(error)
        return WRONG if isinstance(error, ValueError) or error.errno in WRONG_PATH else FAILED
    except RuntimeError as error:
        lost = [cure for words, cure in LOST.items() if words in str(error)]
        if not lost:
            raise
        end_quietly()
        report_error(f"{lost[0]} ({' '.join(str(error).split())})")
        return FAILED


def end_quietly() -> None:
    """Keep torch from raising for a lost worker whose signal comes after its pipe has closed, while all is put away."""
    if (
        hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    ):  # Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def run(config: Config, stop: StopRequest) -> int:
    """Begin or resume the run in `config.output_dir` and train it to its end; returns the exit code."""
    with watching(config.train.patience_minutes):
        trainer = Trainer(config)
        trainer.resume()
        if trainer.finished:
            more = "raise train.max_steps or train.max_minutes, whichever ended it, to train it on"
            trainer.journal.say(f"{config.output_dir} is finished; {more}")
            code = _code_of_complete(trainer)
        else:
            code = train(trainer, stop)
    trainer.accelerator.end_training()
    return code


def train(trainer: Trainer, stop: StopRequest, after_step: Callable[[Trainer], None] | None = None) -> int:
    """Train a run that has begun until it is complete or `stop` has been received; returns the exit code.

    `after_step` is called with the trainer after each step that moved the weights: to look, not to change.
    """
    every = trainer.config.train
    # Before the first step there is nothing to save, so until here a signal ends the run at once.
    with stop, closing(trainer.journal), refreshed(trainer.journal.bar):
        for micro_batches in trainer.steps(stop):
            report = trainer.train_step(micro_batches)
            if report is None:  # a number was not finite: nothing has changed
                continue
            trainer.journal.log(trainer.state.step, trainer.progress, report)
            if after_step is not None:
                after_step(trainer)
            if trainer.stopped_by:  # first of all: launchers kill what has not ended after 30 seconds
                trainer.checkpoint()
            if trainer.due(every.validate_every):
                trainer.exporter.validate()
            if trainer.due(every.checkpoint_every):
                trainer.exporter.save_codec()
                trainer.checkpoint()
        trainer.checkpoint()
        if not trainer.stopped_by:
            trainer.exporter.finish()
        trainer.journal.say_what_was_broken()
    return exit_code(trainer.stopped_by) if trainer.stopped_by else _code_of_complete(trainer)


def _code_of_complete(trainer: Trainer) -> int:
    alone = trainer.accelerator.num_processes == 1
    return LOOK if alone and trainer.journal.has_rejects else DONE
