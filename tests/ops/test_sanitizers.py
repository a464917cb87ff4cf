"""The native functions under the address and undefined-behaviour sanitizers, held against torch by their own tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = [
    "test_native_pointwise.py",
    "test_native_convolution.py",
    "test_winograd.py",
    "test_training_convolutions.py",
]
SANITIZED = """
import sys, pytest
from latentcodec.ops.native import build
build.FLAGS += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
assert build.library() is not None
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def runtime(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="the sanitizers' libraries are loaded first, as Linux does it"
)
def test_no_access_out_of_bounds_and_nothing_undefined(tmp_path):
    environment = os.environ | {
        "CXX": "g++",
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",  # Python and torch keep much
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(HERE.parents[1]),
    }
    tests = [str(HERE / name) for name in TESTS]
    run = subprocess.run(
        [sys.executable, "-c", SANITIZED, *tests], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
