"""Train a latent codec.

    accelerate launch train/train.py --config train/configs/NAME.yaml --output_dir runs/NAME --data.path FOLDER
    torchrun --nproc_per_node 8 train/train.py ...            # the same on several GPUs

Without --data.path it trains on drawn pictures, so it runs anywhere. The same command again resumes. It leaves
runs/NAME/codec/ (a plain diffusers AutoencoderKL folder), metrics.jsonl, samples/, checkpoints/, config.yaml and, in
the end, result.json. `--help` lists every setting. Exit codes: latentcodec/training/loop.py. Several machines:
docs/several-machines.md.
"""

import sys

from latentcodec.training.loop import main

if __name__ == "__main__":
    sys.exit(main())
