"""The short form of kill_training.py: the real train/train.py, killed before a few of its file operations."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "kill_training.py"


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_as_if_left_in_peace(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kills", "8", "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    tally = json.loads(ended.stdout.splitlines()[-1])
    assert (tally["kills"], tally["faults"]) == (8, 0)
    assert tally["kills_at_an_operation"] >= 3
    assert tally["resumes"] >= 2
