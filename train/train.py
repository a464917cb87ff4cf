"""Train a latent codec.

    accelerate launch train/train.py --config train/configs/NAME.yaml --output_dir runs/NAME --data.path FOLDER
    torchrun --nproc_per_node 8 train/train.py ...            # the same on several GPUs

Without --data.path it trains on drawn pictures, so it runs anywhere. The same command again resumes. It leaves
runs/NAME/codec/ (a plain diffusers AutoencoderKL folder), metrics.jsonl, samples/, checkpoints/, config.yaml and, in
the end, result.json. `--help` lists every setting. Exit codes: latentcodec/training/loop.py. Several machines:
docs/several-machines.md.
"""

import os
import sys

if __name__ == "__main__":
    from latentcodec.extras import require_docstrings
    from latentcodec.openmp import wait_briefly
    from latentcodec.training.console import end_at_interrupt, ticking

    require_docstrings()
    end_at_interrupt()
    wait_briefly()
    with ticking(
        "loading PyTorch and diffusers", shown=os.environ.get("RANK", "0") == "0"
    ):  # which takes seconds
        from latentcodec.training.loop import main

    sys.exit(main())
