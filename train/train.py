"""Train a latent codec.

    accelerate launch train/train.py --config train/configs/NAME.yaml --output_dir runs/NAME --data.path FOLDER
    torchrun --nproc_per_node 8 train/train.py ...            # the same on several GPUs

Without --data.path it trains on drawn pictures, so it runs anywhere. The same command again resumes. It leaves
runs/NAME/codec/ (a plain diffusers AutoencoderKL folder), metrics.jsonl, samples/, checkpoints/, config.yaml and, in
the end, result.json. `--help` lists every setting. Ends with code 0 when the run is complete, 128 + signal after a
signal (143 SIGTERM, 130 Ctrl-C, 138 SIGUSR1) with a checkpoint of the last step, 2 for a wrong setting, 1 for any
other error. Several machines: docs/several-machines.md.
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    if os.environ.get("RANK", "0") == "0":
        print("loading PyTorch and diffusers", file=sys.stderr, flush=True)  # which takes seconds
    from latentcodec.training.config import parse
    from latentcodec.training.signals import StopRequest, exit_code
    from latentcodec.training.trainer import Trainer

    config = parse()
    every = config.train
    stop = StopRequest()
    trainer = Trainer(config)
    trainer.resume()
    if trainer.finished:
        more = "raise train.max_steps or train.max_minutes, whichever ended it, to train it on"
        trainer.journal.say(f"{config.output_dir} is finished; {more}")
        return 0
    with stop:  # before the first step there is nothing to save, so until here a signal ends the run at once
        for micro_batches in trainer.steps(stop):
            report = trainer.train_step(micro_batches)
            if report is None:  # a number was not finite: nothing has changed
                continue
            trainer.journal.log(trainer.step, trainer.progress, report)
            if trainer.due(every.validate_every):
                trainer.validate()
            if trainer.due(every.checkpoint_every):
                trainer.save_codec()
                trainer.checkpoint()
        trainer.checkpoint()
        if not trainer.stopped_by:
            trainer.finish()
        trainer.journal.end()
    return exit_code(trainer.stopped_by) if trainer.stopped_by else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:  # what a user can mend; all else shows its traceback
        sys.exit(f"error: {error}")
