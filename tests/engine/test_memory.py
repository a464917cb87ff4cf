"""Sizes as people write them, and a pass that stays within the bytes that were planned for it."""

from math import inf, nan

import pytest
import torch
from stock_pairs import CONFIGS, pair
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentcodec import optimize_vae
from latentcodec.engine import plan
from latentcodec.engine.memory import parse_bytes
from latentcodec.engine.plan import Engine
from latentcodec.engine.strips import StripPass


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", None),
        ("Auto ", None),
        (6_000_000, 6_000_000),
        (6e9, 6_000_000_000),
        (1.9, 1),
        ("4096", 4096),
        ("6GB", 6 * 1000**3),
        ("6gb", 6 * 1000**3),
        (" 1.5 GiB ", 3 * 512 * 1024**2),
        (".5 TiB", 1024**4 // 2),
        ("2e9", 2_000_000_000),
        ("100 kB", 100_000),
        ("12 b", 12),
    ],
)
def test_sizes_are_read_as_people_write_them(given, expected):
    assert parse_bytes(given) == expected


@pytest.mark.parametrize(
    "given", ["", "6 G", "6GBs", "GB", "-1", "1,5GB", "0", 0, -5, 0.2, nan, inf, True, None, [1], "1e999"]
)
def test_what_is_no_size_is_named(given):
    with pytest.raises(ValueError, match=r"max_memory is .*give 'auto', or bytes"):
        parse_bytes(given)


def test_a_size_that_is_none_leaves_the_vae_as_it_was():
    reference, _ = pair(CONFIGS["sd"])
    encoder = reference.encoder
    with pytest.raises(ValueError, match="max_memory is 'plenty'"):
        optimize_vae(reference, max_memory="plenty")
    assert reference.encoder is encoder


def test_a_bound_as_text_is_the_bound():
    _, vae = pair(CONFIGS["sd"])
    optimize_vae(vae, max_memory="1.5 GiB")
    assert vae.encoder.engine.max_memory == vae.decoder.engine.max_memory == 3 * 2**29


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of operations held at once, the weights of `model` aside."""

    def __init__(self, model):
        super().__init__()
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.weights:
                storage = value.untyped_storage()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


def peak_and_plan(batch, keeps, monkeypatch):
    """Bytes that a decoder's pass held at most, and those that were planned for it; strips of two rows."""
    _, vae = pair(CONFIGS["photo-f8c16"])
    monkeypatch.setitem(plan.STRIP_BYTES, "cpu", 1)
    z = torch.randn(batch, vae.config.latent_channels, 16, 16)
    stages = [(16 << i, 16 << i, stage) for i, stage in enumerate(vae.decoder.up_blocks)]
    maps = max(h * w * plan._channels_at_once(stage, keeps) for h, w, stage in stages) * batch * 4
    run = Engine()._plan(z, stages, vae.decoder.mid_block)
    run = StripPass(run.dtype, run.kernels, run.strip_bytes, run.score_bytes, keeps, run.scratch)
    with torch.inference_mode():
        run.decode(vae.decoder, z)  # weights are packed
        with LiveBytes(vae) as live:
            run.decode(vae.decoder, z)
    return live.peak, maps


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "made again"])
@pytest.mark.parametrize("batch", [1, 3])
def test_strips_are_freed_as_they_are_read(batch, keeps, monkeypatch):
    """The pass holds the maps of one block and a few strips; held to its end, all maps would be several times that."""
    peak, maps = peak_and_plan(batch, keeps, monkeypatch)
    assert maps / 2 < peak <= 1.35 * maps


def test_a_bound_counts_the_whole_batch():
    _, vae = pair(CONFIGS["sd"])
    stages = [(8 << i, 8 << i, stage) for i, stage in enumerate(vae.decoder.up_blocks)]

    def needed(batch):
        with pytest.raises(ValueError, match=r"needs ([\d,]+)") as error:
            Engine(max_memory=1)._plan(torch.randn(batch, 4, 8, 8), stages, vae.decoder.mid_block)
        return int(str(error.value).split("needs ")[1].replace(",", ""))

    assert needed(4) == pytest.approx(4 * needed(1), rel=0.01)
