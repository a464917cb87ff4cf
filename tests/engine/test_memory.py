"""Sizes as people write them, and a pass that stays within the bytes that were planned for it."""

import re
import weakref
from math import inf, nan

import psutil
import pytest
import torch
from stock_pairs import ALL_MAPS, CONFIGS, config, pair
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentcodec import control_groups, optimize_vae
from latentcodec.engine import needs, plan, recordings
from latentcodec.engine.memory import free_memory, parse_bytes
from latentcodec.engine.networks import EngineEncoder
from latentcodec.engine.plan import Engine
from latentcodec.engine.strips import StripPass
from latentcodec.ops import convolutions
from latentcodec.ops.native import winograd
from latentcodec.ops.native.build import library


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


def test_what_torch_keeps_of_a_gpu_for_its_next_tensors_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert free_memory(torch.device("cuda", 1)) == 500


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/", {"memory.max": "max\n"}, None),
        ("0::/", {"memory.max": "8000\n", "memory.current": "5000\n"}, 5600),
        (
            "0::/job/step",
            {"job/memory.max": "8000", "job/memory.current": "7000", "job/step/memory.max": "max"},
            3600,
        ),
        ("0::/", {"memory.max": "8000", "memory.current": "9999999"}, 0),
        (
            "9:memory:/docker/1",
            {"memory/memory.limit_in_bytes": "8000\n", "memory/memory.usage_in_bytes": "5000\n"},
            5600,
        ),
    ],
)
def test_what_a_container_may_still_take_is_free(tmp_path, monkeypatch, groups, files, free):
    """ "auto" counted the memory of the whole machine, and the container was killed."""
    monkeypatch.setattr(control_groups, "PROCESS_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(control_groups, "CGROUPS", tmp_path / "fs")
    (tmp_path / "cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        prefix = "total_" if "limit_in_bytes" in name else ""
        (path.parent / "memory.stat").write_text(
            f"anon 4400\n{prefix}active_file 100\n{prefix}inactive_file 2500\n"
        )
    expected = psutil.virtual_memory().available if free is None else free
    assert free_memory(torch.device("cpu")) == pytest.approx(expected, rel=0.05)


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


class Opaque(weakref.ref):
    """Of a tensor without a storage."""

    def expired(self):
        return self() is None


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of operations held at once, the weights of `model` and what was `given` aside."""

    def __init__(self, model, *given):
        super().__init__()
        self.weights = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *given)}
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.is_mkldnn:  # a packed weight, which has no storage
                self.storages[id(value)] = Opaque(value), value.numel() * value.itemsize
            elif isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.weights:
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
    maps = max(h * w * needs.channels_at_once(stage, keeps) for h, w, stage in stages) * batch * 4
    run = Engine()._plan(z, stages, vae.decoder)
    run = StripPass(
        run.dtype, run.kernels, run.strip_bytes, run.score_bytes, ALL_MAPS if keeps else 0, run.scratch
    )
    with torch.inference_mode():
        run.decode(vae.decoder, z)  # weights are packed
        with LiveBytes(vae) as live:
            run.decode(vae.decoder, z)
    return live.peak, maps


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "made again"])
@pytest.mark.parametrize("batch", [1, 3])
def test_strips_are_freed_as_they_are_read(batch, keeps, monkeypatch):
    """The pass holds the maps of one block and a few strips; held to its end, all maps would be several times that."""
    peak, maps = peak_and_plan(batch, keeps, monkeypatch)
    assert maps / 2 < peak <= 1.35 * maps


def bytes_named(vae, direction, x, max_memory=1):
    """What the error says that is needed."""
    optimize_vae(vae, max_memory=max_memory)
    with torch.no_grad(), pytest.raises(ValueError, match=r"it needs ([\d,]+), of which weights") as error:
        vae.encode(x) if direction == "encode" else vae.decode(x)
    return int(re.search(r"it needs ([\d,]+),", str(error.value))[1].replace(",", ""))


def test_a_bound_counts_the_whole_batch():
    _, vae = pair(CONFIGS["sd"])
    one, two, three = (bytes_named(vae, "decode", torch.randn(batch, 4, 8, 8)) for batch in (1, 2, 3))
    assert two > one
    assert three - two == two - one


WIDE = {
    "as published": CONFIGS["sd"],
    "many image channels": config(in_channels=70, out_channels=90),
    "many latent channels": config(latent=150),
    "one stage": config(channels=(16,), latent=40),
    "no attention": config(channels=(16, 48), mid_block_add_attention=False),
}


@pytest.mark.parametrize(
    ("compiled", "keep_packed"),
    [(True, True), (True, False), (False, True), pytest.param(False, False, marks=pytest.mark.slow)],
    ids=["native-packed weights stay", "native-they go", "torch-packed weights stay", "torch-they go"],
)
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize(
    "configuration",
    [
        pytest.param(
            given, id=name, marks=[pytest.mark.slow] if name in ("as published", "no attention") else []
        )
        for name, given in WIDE.items()
    ],
)
def test_the_bytes_that_an_error_names_suffice(configuration, direction, compiled, keep_packed):
    """And the pass stays within them; the first call, in which weights are prepared, too."""
    _, vae = pair(configuration)
    network = vae.encoder if direction == "encode" else vae.decoder
    f = 2 ** (len(configuration["block_out_channels"]) - 1)
    channels = vae.config.in_channels if direction == "encode" else vae.config.latent_channels
    x = (
        torch.randn(2, channels, 96, 80)
        if direction == "encode"
        else torch.randn(2, channels, 96 // f, 80 // f)
    )
    network.engine = Engine(1, keep_packed, compiled)
    with torch.no_grad(), pytest.raises(ValueError, match="it needs") as error:
        network(x)
    named = int(re.search(r"it needs ([\d,]+),", str(error.value))[1].replace(",", ""))
    network.engine = Engine(named, keep_packed, compiled)
    own = sum(weight.numel() * weight.itemsize for weight in network.parameters())
    with torch.no_grad():
        network(torch.randn_like(x[:1, :, :f, :f]))  # torch's kernels are there
        with LiveBytes(vae, x) as live:
            ours = engine_on(network, x)
    assert own + live.peak <= named
    assert named <= 3 * (own + live.peak), "the error names far more than is needed"
    network.engine = Engine()
    with torch.no_grad():
        torch.testing.assert_close(ours, network(x), rtol=1e-4, atol=1e-4)
    network.engine = Engine(named - 1, keep_packed, compiled)
    with torch.no_grad(), pytest.raises(ValueError, match="it needs"):
        network(x)


def engine_on(network, x):
    """The network's pass as `forward` begins it; a dispatch mode would send it to the plain modules."""
    run = network.engine.encode if isinstance(network, EngineEncoder) else network.engine.decode
    return run(network, x)


def test_packed_weights_go_after_each_pass_if_they_shall():
    _, vae = pair(CONFIGS["photo-f8c16"])
    x = torch.randn(1, 3, 64, 64)
    prepared = []
    for keep in (True, False):
        optimize_vae(vae, keep_packed=keep)
        with torch.no_grad():
            vae.encode(x), vae.encode(x)
        prepared.append(sum(layer in convolutions._prepared for layer in vae.encoder.modules()))
        assert (vae.encoder in recordings._known) == keep
    assert prepared[0] > 10
    assert prepared[1] == 0


@pytest.mark.skipif(library() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_what_was_prepared_of_the_weights_of_a_stage_is_freed_before_the_next(direction, monkeypatch):
    """The lowest stage has the largest weights, the highest one the largest maps; nobody needs room for both."""
    monkeypatch.setattr(winograd, "KEPT_VALUES", 0)
    _, vae = pair(config(channels=(32, 64, 128), mid_block_add_attention=False))
    network = vae.encoder if direction == "encode" else vae.decoder
    network.engine = Engine(1 << 33)  # with a bound, nothing is recorded, and so nothing held for a recording
    x = torch.randn(1, 3, 128, 128) if direction == "encode" else torch.randn(1, 4, 32, 32)
    held: list[tuple[int, int]] = []
    residual = StripPass._residual

    def spy(run, block, *given):
        begun = sum(memory.numel() for memory in run.workspace.weights)
        result = residual(run, block, *given)
        held.append((begun, sum(memory.numel() for memory in run.workspace.weights)))
        return result

    monkeypatch.setattr(StripPass, "_residual", spy)
    with torch.no_grad():
        engine_on(network, x)
    firsts = {"encode": [0, 1, 2], "decode": [2, 4, 6]}[direction]  # residual blocks that begin a stage
    assert all(held[index][0] == 0 for index in firsts)
    assert max(after for _, after in held) > 0
