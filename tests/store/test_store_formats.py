"""What a store holds in every number format: for stock readers, in exports, and from the caches of others."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stores import SMALL, write_pictures
from stores import make_and_open as make

from latentcodec.store import LatentStore, encode, finish, prepare, verify
from latentcodec.store.caches import read_cache
from latentcodec.store.export import export
from latentcodec.store.quantize import TORCH, dequantize, quantize


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
