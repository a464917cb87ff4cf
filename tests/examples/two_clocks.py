"""What each of two processes does, for test_examples_of_stores.py: trains; the second's clock runs twice as fast."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import train_on_latents

if __name__ == "__main__":
    speed = 1 + int(os.environ["RANK"])
    train_on_latents.time = SimpleNamespace(monotonic=lambda: speed * time.monotonic())
    train_on_latents.main()
