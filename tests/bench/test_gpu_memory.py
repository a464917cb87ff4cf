"""How the bench of throughput looks at the memory of a GPU; by its bookkeeping, without one."""

from types import SimpleNamespace

import pytest
import torch

from latentcodec.adopt import build
from latentcodec.codec import LatentCodec
from latentcodec.speed import memory
from latentcodec.speed.sides import Case, fits

CASE = Case("decode", "float32", 512, 1)


@pytest.fixture
def codec():
    return LatentCodec(build({"block_out_channels": [8], "norm_num_groups": 2}))


@pytest.mark.parametrize(("device", "passes"), [("cpu", 1), ("cuda", 3)])
def test_the_peak_on_a_gpu_is_that_of_passes_as_they_are_timed(codec, monkeypatch, device, passes):
    """The second one is recorded, in memory that is kept, and only the third one is replayed."""
    setup = SimpleNamespace(device=device, codec=lambda dtype: codec, vae=lambda side, dtype: codec.vae)
    done = []
    monkeypatch.setattr(memory, "inputs", lambda *what: SimpleNamespace(to=lambda *where: what[-1].size))
    monkeypatch.setattr(memory, "call", lambda vae, direction, size: done.append(size))
    monkeypatch.setattr(memory, "forget_peak", lambda device: done.append("new peak"))
    monkeypatch.setattr(memory, "memory_in_use", lambda device, peak=False: 5 * peak)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *setting: 1))
    monkeypatch.setattr("os.access", lambda path, mode: True)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    assert memory.peak_bytes(setup, "ours", [CASE], 1, "") == [(5, 5)]
    small = 32 * codec.downsampling_factor
    assert done == ["new peak", *[small] * passes, "new peak", "new peak", *[512] * passes]


@pytest.mark.parametrize(("allocated", "is_room"), [(1 << 30, True), (9 << 30, False)])
def test_what_torch_keeps_of_a_gpu_s_memory_is_free(codec, monkeypatch, allocated, is_room):
    """A side that fits was left out after another one, whose freed memory torch had kept."""
    gpu = torch.device("cuda:1")
    monkeypatch.setattr(type(codec.vae), "device", gpu)
    sizes = {"memory_reserved": 9 << 30, "memory_allocated": allocated, "mem_get_info": (1 << 10, 10 << 30)}
    for name, size in sizes.items():
        monkeypatch.setattr(f"torch.cuda.{name}", {gpu: size}.__getitem__)
    assert fits("diffusers", codec.vae, CASE) == is_room
