"""Reading: stock tools, items and batches, the stream for training, damage that is found, caches of others."""

import io
import json
import pickle
import random
import shutil
import tarfile
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stores import SMALL, tiny_codec, write_pictures
from torch.utils.data import DataLoader

from latentcodec.pixels import load_image
from latentcodec.store import EncodeBatch, LatentStore, StoreError, encode, finish, prepare, verify
from latentcodec.store.caches import read_cache
from latentcodec.store.export import export
from latentcodec.store.quantize import TORCH, dequantize, quantize


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


def make(photos, out, codec, **options):
    prepare([str(photos)], out, codec, **{**SMALL, **options})
    encode(out, codec, workers=0)
    return LatentStore(out)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("reading") / "photos", 11, captions=True)


@pytest.fixture(scope="module")
def store(photos, codec):
    return make(photos, photos.parent / "store", codec)


@pytest.fixture(scope="module")
def drawn(photos, codec):
    return make(photos, photos.parent / "drawn", codec, posterior="mean and std", mirrored=True)


# --- number formats and other people's readers


@pytest.mark.parametrize("dtype", list(TORCH))
def test_what_is_stored_is_what_is_read(photos, tmp_path, codec, dtype):
    exact = make(photos, tmp_path / "exact", codec, dtype="float32").batch(range(11))["latent"]
    store = make(photos, tmp_path / dtype, codec, dtype=dtype)
    bound = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8, "float8": 2**-4}
    batch = store.batch(range(11))["latent"].float()
    if dtype == "int8":
        spread = exact.amax((2, 3), keepdim=True) - exact.amin((2, 3), keepdim=True)
        assert ((batch - exact).abs() <= spread / 254 / 2 * 1.001 + 1e-6).all()
        assert store.index.bits_per_value == pytest.approx(8 + 64 / 64)
    else:
        assert ((batch - exact).abs() <= exact.abs() * bound[dtype] + 2**-10).all()
        assert store.index.bits_per_value == TORCH[dtype].itemsize * 8
    assert torch.equal(batch, torch.stack([item.latent for item in store]).float())
    assert verify(store.folder).ok


def test_quantisation_of_zeros_and_large_values():
    z = torch.tensor([0.0, 1e9, -500.0, 3.0]).view(4, 1, 1, 1)
    assert dequantize(quantize(z[:1], "int8")).item() == 0
    assert dequantize(quantize(z, "float8"))[:, 0, 0, 0].tolist() == [0, 448, -448, 3]
    assert torch.allclose(dequantize(quantize(z, "int8")), z)
    with pytest.raises(ValueError, match="dtype 'float64'"):
        quantize(z, "float64")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "bfloat16"])
def test_stock_readers(photos, tmp_path, codec, dtype):
    store = make(photos, tmp_path / "store", codec, dtype=dtype)
    shards = str(store.folder / "shards/4x8x8/*.arrow")
    ids = [item.id for item in store]
    expected = np.stack([store.shard(n)._latents["latent"][row] for n, row in map(store.place, range(11))])
    first = pa.ipc.open_file(store.folder / store.index.shards[0].file).read_all()
    assert first["id"].to_pylist() == ids[:4]
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "arrow", data_files=shards, split="train", cache_dir=str(tmp_path / "cache")
    )
    ours = store.to_datasets()
    polars = pytest.importorskip("polars")
    frame = polars.scan_ipc(shards).collect()
    for table in (loaded, ours, frame):
        assert list(table["id"]) == ids
        if dtype == "bfloat16":
            assert b"".join(table["latent"]) == expected.tobytes()
        else:
            assert np.array_equal(np.array([list(row) for row in table["latent"]]), expected)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_exports_hold_the_same_latents(photos, tmp_path, codec, dtype):
    store = make(photos, tmp_path / "store", codec, dtype=dtype)
    for file in export(store, "parquet", tmp_path / "parquet"):
        table = pq.read_table(file)
        assert table.schema.metadata[b"latent_shape"] == b"[4, 8, 8]"
        for name, flat in zip(table["id"].to_pylist(), table["latent"].to_pylist(), strict=True):
            item = next(item for item in store if item.id == name)
            assert np.array_equal(np.array(flat, np.float32), item.latent.float().numpy().ravel())
    names = set()
    for file in export(store, "webdataset", tmp_path / "tars"):
        with tarfile.open(file) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for key in (name.removesuffix(".json") for name in members if name.endswith(".json")):
            metadata = json.loads(members[f"{key}.json"])
            item = next(item for item in store if item.id == metadata["id"])
            latent = np.load(io.BytesIO(members[f"{key}.latent.npy"]))
            assert np.array_equal(latent, item.latent.numpy())
            assert metadata["caption"] == item.caption
            names.add(item.id)
    assert len(names) == 11
    with pytest.raises(ValueError, match="parquet or webdataset"):
        export(store, "zarr", tmp_path)


@pytest.mark.parametrize("to", ["parquet", "webdataset"])
def test_an_export_that_is_there_stays_only_where_it_is_of_this_store(photos, tmp_path, codec, to):
    """Not where pictures were dropped since, nor where it is another store's, or damaged."""

    def exported(store):
        before = {file: file.stat().st_ino for file in out.glob("*/*") if file.suffix != ".json"}
        files = export(LatentStore(store), to, out)
        return files, [file for file in files if before.get(file) != file.stat().st_ino]

    def pictures(files):
        if to == "parquet":
            return [name for file in files for name in pq.read_table(file)["id"].to_pylist()]
        found = []
        for file in files:
            with tarfile.open(file) as tar:
                names = [member for member in tar if member.name.endswith(".json")]
                found += [json.loads(tar.extractfile(member).read())["id"] for member in names]
        return found

    def expected(store):
        return [item.id for item in LatentStore(store)]

    out, one, other = tmp_path / "out", tmp_path / "one", tmp_path / "other"
    make(photos, one, codec)
    files, written = exported(one)
    assert (len(written), exported(one)) == (3, (files, []))
    finish(one, drop=["005.png"])
    assert exported(one) == (files, files[1:2])
    assert pictures(files) == expected(one)
    files[0].write_bytes(files[0].read_bytes()[:100])
    if to == "parquet":  # a tar has no end to tell it by
        assert exported(one)[1] == files[:1]
    make(write_pictures(tmp_path / "others", 11, first=20), other, codec)
    assert exported(other)[1] == files
    assert pictures(files) == expected(other)
    finish(other, drop=expected(other)[8:])
    with pytest.raises(ValueError, match=rf"{files[2]}: no file of this export; delete it"):
        exported(other)


# --- items and batches


def test_batches_hold_the_items_in_the_order_that_was_asked_for(drawn):
    for numbers in ([0, 1, 2], [10, 0, 7, 7, 3], [4], list(range(11)), [-1, 2]):
        batch = drawn.batch(numbers)
        items = [drawn[number] for number in numbers]
        for name in ("latent", "std", "mirrored", "mirrored_std"):
            assert torch.equal(batch[name], torch.stack([getattr(item, name) for item in items]))
        for name in ("id", "caption", "label", "source"):
            assert batch[name] == [getattr(item, name) for item in items]
        assert batch["size"].tolist() == [list(item.size) for item in items]
    with pytest.raises(IndexError, match="picture 11 of 11"):
        drawn[11]


def test_reading_gives_copies(store):
    item, batch = store[0], store.batch([0])
    item.latent.fill_(7)
    batch["latent"].fill_(7)
    assert not (store[0].latent == 7).any()


def test_a_store_is_a_data_set_for_workers(store):
    loader = DataLoader(store, batch_size=4, num_workers=2, collate_fn=list)
    assert [item.id for batch in loader for item in batch] == [item.id for item in store]


def test_another_codec_is_refused_with_both_fingerprints(store, codec):
    other = tiny_codec(seed=1)
    with pytest.raises(StoreError, match=rf"{store.fingerprint}.*given is [0-9a-f]{{64}}"):
        LatentStore(store.folder, other)
    assert LatentStore(store.folder, codec).fingerprint == store.fingerprint


def test_the_store_brings_its_codec(store, photos):
    codec = store.codec()
    x = load_image(photos / "003.png")
    assert torch.allclose(codec.encode(x)[0], store[3].latent.float(), atol=2e-3)


# --- the stream


def ids(stream, **loader):
    return [batch["id"] for batch in DataLoader(stream, batch_size=None, **loader)]


def test_an_epoch_is_every_picture_once_in_another_order(store):
    stream = store.dataset(2)
    first, again = ids(stream), ids(stream)
    assert first == again
    assert len(stream) == len(first) == 5
    assert len({name for batch in first for name in batch}) == 10  # 11 pictures, the last batch is not full
    stream.set_epoch(1)
    assert ids(stream) != first
    assert [n for b in ids(store.dataset(3, shuffle=False, drop_last=False)) for n in b] == [
        i.id for i in store
    ]


def test_ranks_and_workers_see_what_one_process_sees(store):
    whole = ids(store.dataset(4))
    halves = [ids(store.dataset(2, rank=rank, world=2), num_workers=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_draws_and_mirrors_do_not_depend_on_the_ranks(drawn):
    whole = next(iter(drawn.dataset(4)))
    halves = [next(iter(drawn.dataset(2, rank=rank, world=2))) for rank in (0, 1)]
    assert torch.equal(whole["latent"], torch.cat([half["latent"] for half in halves]))
    for k, index in enumerate(whole["index"].tolist()):
        item = drawn[index]
        flipped = bool(whole["is_mirrored"][k])
        mean, std = (item.mirrored, item.mirrored_std) if flipped else (item.latent, item.std)
        noise = (whole["latent"][k] - mean.float()) / std.float()
        assert abs(noise.mean().item()) < 0.3
        assert noise.std().item() == pytest.approx(1, abs=0.2)
    later = drawn.dataset(4)
    later.set_epoch(1)
    draws = {n: z for b in (whole, *later) for n, z in zip(b["index"].tolist(), b["latent"], strict=True)}
    assert not torch.equal(draws[int(whole["index"][0])], whole["latent"][0])


def test_resume_goes_on_with_the_next_batch_on_any_number_of_ranks(store):
    stream = store.dataset(4, seed=5)
    stream.set_epoch(3)
    batches = list(stream)
    state = json.loads(json.dumps(stream.state_after(batches[0])))
    resumed = [store.dataset(2, seed=5, rank=rank, world=2) for rank in (0, 1)]
    for half in resumed:
        half.load_state_dict(state)
    assert [a["id"] + b["id"] for a, b in zip(*resumed, strict=True)] == [
        batch["id"] for batch in batches[1:]
    ]
    with pytest.raises(ValueError, match="global_batch 4, here 8"):
        store.dataset(4, seed=5, rank=0, world=2).load_state_dict(state)


def test_the_loop_over_epochs_goes_on_where_a_loaded_state_was(store):
    """The loop of docs/store.md, stopped within its second epoch."""

    def loop(stream):
        for epoch in range(stream.epoch, 3):
            stream.set_epoch(epoch)
            for batch in stream:
                yield batch["id"], stream.state_after(batch)

    whole = list(loop(store.dataset(2)))
    for stopped_at in (0, 6, len(whole) // 3 - 1):  # the last is the end of the first epoch
        later = store.dataset(2)
        later.load_state_dict(whole[stopped_at][1])
        assert [names for names, _ in loop(later)] == [names for names, _ in whole[stopped_at + 1 :]]


def test_workers_that_stay_follow_the_epochs_and_a_loaded_state(store):
    """The same loop with workers that live from epoch to epoch."""
    stream = store.dataset(2)
    state, whole = stream.state_after({"step": 1}), ids(stream)
    stream.set_epoch(1)
    whole = whole[2:], ids(stream)
    later = pickle.loads(pickle.dumps(store.dataset(2)))
    later.load_state_dict(state)
    loader = DataLoader(later, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        later.set_epoch(epoch)
        assert [batch["id"] for batch in loader] == whole[epoch]


def test_a_stream_that_is_sent_to_a_worker_follows_the_epochs(store):
    stream = store.dataset(2)
    there = pickle.loads(ForkingPickler.dumps(stream))  # as workers get it that are spawned
    stream.set_epoch(1)
    assert there.epoch == 1
    assert ids(there) == ids(stream)


def test_a_store_that_was_read_can_be_sent_to_a_worker(store):
    item = store[0]
    assert torch.equal(pickle.loads(pickle.dumps(store))[0].latent, item.latent)


def test_a_state_of_another_store_of_as_many_pictures_is_refused(store, tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", len(store), first=100)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    encode(tmp_path / "store", codec, workers=0)
    other = LatentStore(tmp_path / "store")
    assert (len(other), other.fingerprint) == (len(store), store.fingerprint)
    stream = store.dataset(2)
    state = stream.state_after({"step": 0})
    with pytest.raises(ValueError, match="another stream of batches: index"):
        other.dataset(2).load_state_dict(state)
    for name in ("index", "drop_last", "draw", "mirror"):
        del state[name]  # as earlier versions saved it
    stream.load_state_dict(state)


def test_a_state_of_other_batches_is_refused(drawn):
    state = drawn.dataset(2).state_after({"step": 0})
    for name in ("drop_last", "draw", "mirror"):
        with pytest.raises(ValueError, match=f"another stream of batches: {name} True, here False$"):
            drawn.dataset(2, **{name: False}).load_state_dict(state)


def test_each_task_of_an_array_of_trainings_sees_all_pictures(store, monkeypatch):
    for name, value in (("ID", 2), ("MIN", 0), ("STEP", 1), ("COUNT", 4)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert (store.dataset(2).rank, store.dataset(2).world) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (store.dataset(2).rank, store.dataset(2).world) == (1, 2)


def test_a_batch_that_nothing_fills_is_refused(store):
    with pytest.raises(ValueError, match="no 2000 pictures of one shape"):
        store.dataset(1000, rank=0, world=2)
    assert len(store.dataset(1000, drop_last=False)) == len(store.shapes)
    with pytest.raises(ValueError, match="batch_size 0: at least 1"):
        store.dataset(0)
    with pytest.raises(ValueError, match="rank 2 of 2: ranks are 0 to 1"):
        store.dataset(1, rank=2, world=2)


def test_batches_have_one_shape_in_a_store_of_buckets(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 9, sizes=((32, 32), (24, 40)))
    store = make(photos, tmp_path / "store", codec)
    shapes = [tuple(batch["latent"].shape) for batch in store.dataset(2)]
    assert sorted(shapes) == [(2, 4, 6, 10)] * 2 + [(2, 4, 8, 8)] * 2
    with pytest.raises(ValueError, match="one latent shape"):
        store.batch([0, 8])
    assert set(store.to_datasets()) == {"4x6x10", "4x8x8"}


def test_what_a_store_does_not_hold(store):
    with pytest.raises(ValueError, match=r"holds no std to draw with; encode with --std$"):
        store.dataset(2, draw=True)
    with pytest.raises(ValueError, match="no mirrored"):
        store.dataset(2, mirror=True)


# --- damage


def damaged(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def test_a_flipped_bit_is_found_with_its_shard_and_picture(photos, tmp_path, codec):
    store = make(photos, tmp_path / "store", codec)
    path = tmp_path / "store" / store.index.shards[1].file
    content = path.read_bytes()
    row = store.shard(1)._latents["latent"][2].tobytes()
    damaged(path, content.index(row) + 5)
    result = verify(tmp_path / "store")
    assert result.bad_shards == {store.index.shards[1].file: [f"{path}: item 2 (006.png) is damaged"]}
    with pytest.raises(StoreError, match="item 2 is damaged"):
        LatentStore(tmp_path / "store", check=True)[6]
    with pytest.raises(StoreError, match="item 2 is damaged"):
        LatentStore(tmp_path / "store", check=True).batch([5, 6])
    path.unlink()
    assert "cannot be read" in verify(tmp_path / "store").bad_shards[store.index.shards[1].file][0]
    encode(tmp_path / "store", codec, workers=0)  # mends it
    assert path.read_bytes() == content
    assert verify(tmp_path / "store").ok


def test_every_flipped_byte_of_a_shard_is_found(photos, tmp_path, codec):
    store = make(photos, tmp_path / "store", codec, keep_codec=False)  # to load it each time takes long
    path = tmp_path / "store" / store.index.shards[0].file
    content = path.read_bytes()
    for offset in random.Random(0).sample(range(len(content)), 150):
        damaged(path, offset)
        assert not verify(tmp_path / "store").ok, offset
        path.write_bytes(content)


def test_a_damaged_codec_and_a_lost_plan_are_found(photos, tmp_path, codec):
    make(photos, tmp_path / "store", codec)
    weights = tmp_path / "store/codec/diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    for damage in (content[:3000], content[:-1] + bytes([content[-1] ^ 1])):
        weights.write_bytes(damage)
        result = verify(tmp_path / "store")
        assert (result.ok, result.bad_shards, list(result.bad_folders)) == (False, {}, ["codec"])
    shutil.rmtree(tmp_path / "store/codec")  # as with --no-codec
    assert verify(tmp_path / "store").ok
    (tmp_path / "store/plan/0000.arrow").unlink()
    assert verify(tmp_path / "store").bad_folders == {
        "plan": f"{tmp_path}/store: holds no plan of an encoding"
    }


def test_an_index_that_lies(photos, tmp_path, codec):
    store = make(photos, tmp_path / "store", codec)
    path = tmp_path / "store/index.json"
    content = path.read_text()
    for old, new, words in (
        ('"version": 1', '"version": 2', "format version 2"),
        ('"items": 11', '"items": 12', "damaged"),
        (store.index.shards[0].sha256, "0" * 64, "damaged"),
        ("shards/4x8x8/000001", "shards/4x8x8/000000", "damaged"),
        ("shards/4x8x8/000001", "../../4x8x8/000001", "damaged"),
        (content, content[:100], "damaged"),
        (content, "[]", "damaged"),
    ):
        path.write_text(content.replace(old, new))
        with pytest.raises(StoreError, match=words):
            LatentStore(tmp_path / "store")
    path.write_text(content)
    shard = tmp_path / "store" / store.index.shards[0].file
    shard.write_bytes((tmp_path / "store" / store.index.shards[2].file).read_bytes())  # 3 rows instead of 4
    with pytest.raises(StoreError, match="3 rows, the index says 4"):
        LatentStore(tmp_path / "store")[0]
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(StoreError, match="damaged or cut short"):
        LatentStore(tmp_path / "store")[0]


def test_no_store_at_all(tmp_path):
    with pytest.raises(StoreError, match="there is no such store"):
        LatentStore(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"holds no index\.json"):
        LatentStore(tmp_path)


# --- caches of other programs


def test_caches_of_kohya_and_simpletuner(tmp_path, codec):
    z = torch.randn(4, 8, 6)
    raw = z * codec.latents_std + codec.latents_mean
    cache = tmp_path / "cache"
    (cache / "sub").mkdir(parents=True)
    np.savez(
        cache / "a_0024x0032_sd.npz",
        latents=raw.numpy(),
        original_size=np.array([48, 70]),
        crop_ltrb=np.array([2, 3, 26, 35]),
    )
    np.savez(cache / "sub/b.npz", latents_8x6=raw.numpy(), original_size_8x6=np.array([48, 70]))
    torch.save(raw.half(), cache / "c.pt")
    torch.save({"latents": raw[None]}, cache / "d.pt")
    torch.save({"latents": print}, cache / "evil.pt")
    (cache / "broken.npz").write_bytes(b"no zip")
    prepare([str(cache)], tmp_path / "store", codec, imported="raw", dtype="float32", **SMALL)
    job = encode(tmp_path / "store", codec, workers=0)
    store = LatentStore(tmp_path / "store", codec)
    assert [item.id for item in store] == ["a_0024x0032_sd.npz", "c.pt", "d.pt", "sub/b.npz"]
    for item in store:
        assert torch.allclose(item.latent, z, atol=2e-3)
        assert item.size == (32, 24)
    assert (store[0].original_size, store[0].crop) == ((70, 48), (3, 2))
    assert job.index.rejected == 2
    with pytest.raises(ValueError, match=r"evil\.pt: cannot be read"):
        read_cache(cache / "evil.pt")


# --- inside other pipelines


def test_encode_batch_in_datasets_map(photos, codec):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": (photos / f"{n:03}.png").read_bytes(), "path": f"{n}.png"} for n in range(3)]
    cells.insert(1, {"bytes": b"no picture", "path": "bad.png"})
    table = datasets.Dataset.from_dict(
        {"image": cells, "path": [cell["path"] for cell in cells]},
        features=datasets.Features({"image": datasets.Image(decode=False), "path": datasets.Value("string")}),
    )
    rows = table.map(EncodeBatch(codec), batched=True, batch_size=4, remove_columns=["image"])
    assert rows["path"][:] == ["0.png", "bad.png", "1.png", "2.png"]
    assert [error is None for error in rows["error"]] == [True, False, True, True]
    assert "bad.png" in rows["error"][1]
    latent = codec.encode(load_image(photos / "001.png"))[0]
    assert np.allclose(np.array(rows["latent"][2]), latent.numpy(), atol=1e-5)
    assert rows["latent"][1] is None


def test_encode_batch_refuses_sizes_as_an_encoding_does(photos, codec):
    with pytest.raises(ValueError, match="--size and --area"):
        EncodeBatch(codec, size=16, area=256)
    with pytest.raises(ValueError, match="--multiple belongs to --area"):
        EncodeBatch(codec, multiple=8)
    with pytest.raises(ValueError, match="--size 2: at least 4, one latent cell"):
        EncodeBatch(codec, size=2)({"bytes": [(photos / "000.png").read_bytes()]})


def test_encode_batch_in_a_plain_loop(photos, codec):
    batch = EncodeBatch(codec, size=16)({"bytes": [(photos / "000.png").read_bytes()], "path": ["000.png"]})
    assert batch["latent"][0].shape == (4, 4, 4)
    with pytest.raises(ValueError, match="'image' or 'bytes'"):
        EncodeBatch(codec)({"path": ["000.png"]})
