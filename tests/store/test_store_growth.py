"""More pictures in a store that is there already, and fewer."""

import pytest
import torch
from stores import digest, make, write_pictures

from latentcodec.store import LatentStore, StoreError, finish, verify


def test_new_pictures_are_appended_as_new_shards(tmp_path, codec):
    photos, out = write_pictures(tmp_path / "photos", 5), tmp_path / "store"
    make([photos], out, codec)
    before = {path: path.read_bytes() for path in out.glob("shards/*/*.arrow")}
    make([photos], out, codec)  # nothing new
    assert len(LatentStore(out).index.shards) == 2
    write_pictures(photos, 3, first=5)
    make([photos], out, codec)
    store = LatentStore(out)
    assert [item.id for item in store] == [f"{n:03}.png" for n in range(8)]
    assert len(store.index.shards) == 3
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_dropped_picture_is_gone_and_stays_gone(tmp_path, codec):
    photos, out = write_pictures(tmp_path / "photos", 6), tmp_path / "store"
    make([photos], out, codec)
    kept = {item.id: item.latent for item in LatentStore(out)}
    finish(out, drop=["002.png"])
    assert verify(out).ok
    store = LatentStore(out, check=True)
    assert {item.id for item in store} == set(kept) - {"002.png"}
    assert all(torch.equal(item.latent, kept[item.id]) for item in store)
    make([photos], out, codec)
    assert len(LatentStore(out)) == 5
    with pytest.raises(StoreError, match=r"no picture 'missing.png'.*--drop"):
        finish(out, drop=["missing.png"])


def test_a_picture_that_two_sources_have_is_dropped_by_its_whole_name(tmp_path, codec):
    one, other = (write_pictures(tmp_path / name, 2) for name in ("one", "other"))
    make([one, other], tmp_path / "store", codec)
    before = digest(tmp_path / "store")
    with pytest.raises(StoreError, match=rf"'000.png' is in 2 sources; .*as {one}/000.png, {other}/000.png"):
        finish(tmp_path / "store", drop=["000.png"])
    assert digest(tmp_path / "store") == before
    finish(tmp_path / "store", drop=[f"{other}/000.png"])
    kept = [(item.source, item.id) for item in LatentStore(tmp_path / "store")]
    assert kept == [(str(one), "000.png"), (str(one), "001.png"), (str(other), "001.png")]


def test_a_picture_with_a_tab_in_its_name_is_dropped(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 3)
    (photos / "001.png").rename(photos / "a\tb.png")
    make([photos], tmp_path / "store", codec)
    assert finish(tmp_path / "store", drop=["a\tb.png"]).items == 2
    assert [item.id for item in LatentStore(tmp_path / "store", check=True)] == ["000.png", "002.png"]
