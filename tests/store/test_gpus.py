"""Which GPU a store's codec is put on, and with whose functions it runs there; by its bookkeeping, without a GPU."""

from types import SimpleNamespace

import pytest
import torch

from latentcodec.store import StoreError
from latentcodec.store.encoding import placed
from latentcodec.store.ranks import local_rank

LAUNCHED = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}
SRUN = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}


@pytest.fixture
def gpus(monkeypatch):
    """Four GPUs, to which nothing is moved; gives the devices that codecs were to be put on."""
    devices = []

    def from_pretrained(vae, device, dtype):
        devices.append(device)
        return SimpleNamespace(vae=vae, device=device, dtype=dtype)

    for name in (*LAUNCHED, *SRUN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("latentcodec.store.encoding.LatentCodec.from_pretrained", from_pretrained)
    return devices


def codec_on(device):
    return SimpleNamespace(vae="the VAE", device=torch.device(device), dtype=torch.float32)


def place_of(codec, device=None, begun_on="cuda", **machine):
    machine = {"device": begun_on, "precision": "float32", **machine}
    return placed(codec, machine, device, "store").device


def test_each_process_of_a_launcher_takes_a_gpu_of_its_own(gpus, monkeypatch):
    """torchrun on two machines of eight put all sixteen ranks on the first GPU of their machine."""
    assert place_of(codec_on("cpu")) == torch.device("cuda")  # torch's current one
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert place_of(codec_on("cpu")) == torch.device("cuda")  # left over: nobody says the rank
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert place_of(codec_on("cpu")) == torch.device("cuda:1")
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert place_of(codec_on("cpu")) == torch.device("cuda:3")
    assert place_of(codec_on("cpu"), "cuda", begun_on="cpu") == torch.device("cuda:3")
    assert place_of(codec_on("cpu"), "cuda:2") == torch.device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert place_of(codec_on("cpu")) == torch.device("cuda:2")  # more processes than GPUs share them
    assert place_of(codec_on("cpu"), "cpu") == torch.device("cpu")


def test_local_ranks_come_from_the_launcher_that_tells_the_rank():
    assert local_rank({}) is None
    assert local_rank(SRUN) == 1
    assert local_rank(LAUNCHED | SRUN) == 3
    assert local_rank(SRUN | {"LOCAL_RANK": "3"}) == 1
    with pytest.raises(ValueError, match="LOCAL_RANK in the environment is 'first', not a number"):
        local_rank(LAUNCHED | {"LOCAL_RANK": "first"})


def test_a_gpu_that_is_named_is_the_one_that_encodes(gpus):
    """A codec on another GPU stayed where it was."""
    assert place_of(codec_on("cuda:0"), "cuda:1") == torch.device("cuda:1")
    assert gpus == [torch.device("cuda:1")]


def test_a_codec_on_a_gpu_stays_there_where_none_is_named(gpus, monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert place_of(codec_on("cuda:2")) == torch.device("cuda:2")
    assert place_of(codec_on("cuda:2"), "cuda") == torch.device("cuda:2")
    assert place_of(codec_on("cuda:2"), "cuda:2") == torch.device("cuda:2")
    assert not gpus  # it is not copied


def test_a_gpu_that_is_not_there_is_named(gpus):
    with pytest.raises(StoreError, match=r"store: device cuda:4: PyTorch finds 4 GPUs here.*\(--device\)"):
        place_of(codec_on("cpu"), "cuda:4")
