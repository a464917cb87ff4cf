"""Encoding: the latents are the codec's, in shards of one shape, whatever kind of source the pictures come from."""

import math
import os

import pytest
import torch
from image_sets import write_tar
from stores import SMALL, make, write_pictures

from latentcodec.pixels import load_image
from latentcodec.store import LatentStore, encode, picture, prepare, verify
from latentcodec.store.items import Columns
from latentcodec.store.picture import bucket


def test_latents_are_those_of_the_codec(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 5, sizes=((32, 32), (30, 41)), captions=True)
    make([photos], tmp_path / "store", codec, dtype="float32")
    store = LatentStore(tmp_path / "store", codec)
    assert len(store) == 5
    assert sorted(item.id for item in store) == [f"{n:03}.png" for n in range(5)]
    for item in store:
        x = load_image(photos / item.id)
        assert torch.allclose(item.latent, codec.encode(x)[0], atol=1e-6)
        assert item.size == item.original_size == tuple(x.shape[-2:])
        assert item.caption == f"picture {int(item.id[:3])}"
        assert item.source == str(photos)
        assert codec.decode(item.latent[None], size=item.size).shape == x.shape


def test_mean_std_and_mirrored_latents(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 3, sizes=((30, 41),))
    make([photos], tmp_path / "store", codec, dtype="float32", posterior="mean and std", mirrored=True)
    for item in LatentStore(tmp_path / "store"):
        x = load_image(photos / item.id)
        padded = torch.nn.functional.pad(x, (0, 3, 0, 2), mode="replicate")
        posterior = codec.vae.encode(padded).latent_dist
        assert torch.allclose(item.std, (posterior.std / codec.latents_std)[0], atol=1e-6)
        assert torch.allclose(item.mirrored, codec.encode(x.flip(-1))[0], atol=1e-6)
        assert not torch.allclose(item.mirrored, item.latent.flip(-1), atol=1e-2)  # which is why it is stored
        assert item.mirrored_std.shape == item.std.shape


def test_size_scales_the_shorter_side_and_takes_the_centre(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 1, sizes=((64, 96),))
    make([photos], tmp_path / "store", codec, size=32)
    item = LatentStore(tmp_path / "store")[0]
    assert (item.size, item.original_size, item.crop) == ((32, 32), (64, 96), (0, 8))
    x = torch.nn.functional.interpolate(
        load_image(photos / "000.png"), (32, 48), mode="bicubic", antialias=True
    )
    assert torch.allclose(item.latent.float(), codec.encode(x[..., 8:40].clamp(-1, 1))[0], atol=2e-3)


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ((512, 512), (512, 512)),
        ((300, 600), (384, 704)),
        ((1000, 1500), (384, 640)),
        ((10, 1000), (256, 1024)),
    ],
)
def test_buckets_keep_area_and_ratio(original, expected):
    assert bucket(original, 512 * 512, 64) == expected
    assert bucket(original[::-1], 512 * 512, 64) == expected[::-1]


@pytest.mark.parametrize(("area", "multiple"), [(256 * 256, 32), (512 * 512, 64), (1024 * 1024, 64)])
def test_no_bucket_of_that_area_has_a_nearer_ratio(area, multiple):
    sides = range(multiple, 4 * round(area**0.5), multiple)
    pairs = [
        (h, w)
        for h in sides
        for w in sides
        if abs(h - area / w) <= multiple / 2 or abs(w - area / h) <= multiple / 2
    ]
    for original in ((640, 480), (480, 640), (1080, 1920), (700, 500), (317, 512), (2000, 1999)):
        found = bucket(original, area, multiple)
        assert found in pairs
        far = [abs(math.log(h / w * original[1] / original[0])) for h, w in (found, *pairs)]
        assert far[0] == pytest.approx(min(far))


def test_a_store_that_an_earlier_version_began_keeps_its_buckets(tmp_path, codec, monkeypatch):
    """There the height was rounded first, so that pictures which are wide got other ratios than tall ones."""
    photos = write_pictures(tmp_path / "photos", 2, sizes=((30, 60), (60, 30)))
    monkeypatch.setattr(
        picture, "bucket", lambda original, *_: (24, 40) if original == (30, 60) else (48, 24)
    )
    prepare([str(photos)], tmp_path / "store", codec, **{**SMALL, "area": 1024, "multiple": 8})
    monkeypatch.undo()
    encode(tmp_path / "store", codec, workers=0)
    assert LatentStore(tmp_path / "store").shapes == {(4, 6, 10): 1, (4, 12, 6): 1}
    assert verify(tmp_path / "store").ok


def test_every_shard_holds_one_shape(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 9, sizes=((40, 40), (30, 60), (60, 30)))
    make([photos], tmp_path / "store", codec, area=1024, multiple=8, shard_size=2)
    store = LatentStore(tmp_path / "store")
    assert store.shapes == {(4, 8, 8): 3, (4, 6, 12): 3, (4, 12, 6): 3}
    assert [entry.items for entry in store.index.shards] == [2, 1] * 3
    assert verify(tmp_path / "store").ok


def test_a_shard_of_large_pictures_holds_fewer(tmp_path, codec, monkeypatch):
    photos, out = write_pictures(tmp_path / "photos", 9, sizes=((32, 32), (96, 96))), tmp_path / "store"
    monkeypatch.setattr("latentcodec.store.planning.SHARD_BYTES", 4 * 4 * 8 * 8 * 2 * 3)  # of 3 small ones
    plan = prepare([str(photos)], out, codec, **SMALL, posterior="mean and std", mirrored=True)
    assert [(plan.shape(n)[1], plan.rows(n)) for n in plan.shards] == [(8, 3), (8, 2)] + [(24, 1)] * 4


def test_sources_of_every_kind_hold_the_same_pictures(tmp_path, codec):
    datasets = pytest.importorskip("datasets")
    photos = write_pictures(tmp_path / "photos", 4, captions=True)
    names = sorted(path.name for path in photos.iterdir())
    write_tar(tmp_path / "set.tar", {name: (photos / name).read_bytes() for name in names})
    cells = [{"bytes": (photos / f"{n:03}.png").read_bytes(), "path": None} for n in range(4)]
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "kind": datasets.Value("int64")}
    )
    table = {"image": cells, "text": [f"picture {n}" for n in range(4)], "kind": list(range(4))}
    dataset = datasets.Dataset.from_dict(table, features=features)
    dataset.to_parquet(tmp_path / "set.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    columns = Columns(caption="text", label="kind")
    latents = {}
    for name, source, extra in (
        ("folder", photos, {}),
        ("glob", f"{photos}/*.png", {}),
        ("tar", tmp_path / "set.tar", {}),
        ("parquet", tmp_path / "set.parquet", {"columns": columns}),
        ("saved", tmp_path / "saved", {"columns": columns}),
    ):
        make([source], tmp_path / name, codec, **extra)
        store = LatentStore(tmp_path / name)
        assert [item.caption for item in store] == [f"picture {n}" for n in range(4)], name
        assert [item.label for item in store] == ([0, 1, 2, 3] if extra else [None] * 4), name
        latents[name] = store.batch(range(4))["latent"]
    assert all(torch.equal(latents["folder"], other) for other in latents.values())


def test_a_file_name_that_is_no_utf_8(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 1)
    os.rename(photos / "000.png", os.fsencode(photos) + b"/caf\xe9.png")
    make([photos], tmp_path / "store", codec)
    assert LatentStore(tmp_path / "store")[0].id == "caf\\udce9.png"
