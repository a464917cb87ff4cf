"""What CPUs run instead of `ops/pointwise.py` and of slow convolutions, in C++; built by `build.py`."""
