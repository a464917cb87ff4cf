"""Sources that a store has already, or has a part of, and pictures that are named twice."""

import json

import datasets
import numpy as np
import pytest
from grey_pictures import greys, left_out, picture, tar
from image_sets import table
from stores import SMALL, digest, tiny_codec

from latentcodec.store import LatentStore, StoreError, listing
from latentcodec.store.items import Columns, Entry, dataset_of
from latentcodec.store.job import encode, prepare
from latentcodec.store.listing import Listed, list_entries

# --- more of a source that a store has already


def encoded(source, out, **options):
    prepare([str(source)], out, tiny_codec(), **SMALL, **options)
    encode(out, workers=0)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    return [(item.source, item.id) for item in LatentStore(out)], rejects


@pytest.fixture
def saved(tmp_path):
    """A data set of two splits, of three and two pictures."""
    splits = {name: table(greys, [{"bytes": picture(grey), "path": None} for grey in greys])
              for name, greys in (("train", (10, 20, 30)), ("test", (40, 50)))}  # fmt: skip
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def test_another_split_is_other_pictures(saved, tmp_path):
    out = tmp_path / "store"
    train, _ = encoded(saved, out)
    assert train == [(str(saved), f"row {row}") for row in range(3)]
    both, _ = encoded(saved, out, columns=Columns(split="test"))
    assert both == [*train, *((f"{saved} [test]", f"row {row}") for row in range(2))]
    assert encoded(saved, out, columns=Columns(split="test"))[0] == both
    assert Columns(subset="big").source("a/b") == "a/b [big, train]"
    assert Columns(subset="big").name("a/b [big, train]") == "a/b"


def test_an_unfinished_store_is_not_gone_on_with_in_another_split(saved, tmp_path):
    prepare([str(saved)], tmp_path / "store", tiny_codec(), **SMALL)
    with pytest.raises(StoreError, match=r"Finish it first, with the split 'train'.*not 'test'"):
        prepare([str(saved)], tmp_path / "store", tiny_codec(), columns=Columns(split="test"), **SMALL)


def test_a_data_set_that_grows_past_a_power_of_ten_keeps_its_rows(tmp_path):
    file = tmp_path / "set.parquet"
    for count in (9, 10):
        table(range(count), [{"bytes": picture(n), "path": None} for n in range(count)]).to_parquet(file)
        dataset_of.cache_clear()
        found, _ = encoded(file, tmp_path / "store")
        assert found == [(str(file), f"row {row}") for row in range(count)]


def test_rows_as_earlier_plans_named_them_are_known(saved, tmp_path, monkeypatch):
    """With zeros before their numbers, and the same for every split."""

    def rows(name, columns):
        return [Listed(Entry(f"row {row:02}", name, "row", offset=row)) for row in range(2)]

    monkeypatch.setattr(listing, "_rows", rows)
    before = encoded(saved, tmp_path / "store", columns=Columns(split="test"))
    assert before[0] == [(str(saved), "row 00"), (str(saved), "row 01")]
    monkeypatch.undo()
    assert encoded(saved, tmp_path / "store", columns=Columns(split="test")) == before
    assert len(encoded(saved, tmp_path / "store")[0]) == 5


def test_what_was_left_out_is_tried_again(tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "store"
    photos.mkdir()
    (photos / "a.png").write_bytes(picture(10))
    (photos / "b.png").write_bytes(b"")
    (photos / "c.png").write_bytes(b"")
    found, rejects = encoded(photos, out)
    assert (len(found), [reject["path"][-5:] for reject in rejects]) == (1, ["b.png", "c.png"])
    whole = digest(out)
    assert encoded(photos, out) == (found, rejects)  # nothing has changed
    assert digest(out) == whole
    (photos / "b.png").write_bytes(picture(20))
    found, rejects = encoded(photos, out)
    assert ([name for _, name in found], [reject["path"][-5:] for reject in rejects]) == (
        ["a.png", "b.png"],
        ["c.png"],
    )


def test_a_tar_beside_pictures_is_added_by_its_own_name(tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "store"
    photos.mkdir()
    (photos / "a.png").write_bytes(picture(10))
    (photos / "b.png").write_bytes(picture(20))
    shard = tar(photos / "one.tar", [("t.png", picture(90))])
    assert len(encoded(photos, out)[1]) == 1
    found, rejects = encoded(shard, out)
    assert ([name for _, name in found], rejects) == (["a.png", "b.png", "t.png"], [])
    assert encoded(photos, out) == (found, rejects)


def test_a_picture_that_a_shard_has_left_out_comes_back_with_the_shard(tmp_path):
    """As docs/encode.md says."""
    photos, out = tmp_path / "photos", tmp_path / "store"
    photos.mkdir()
    (photos / "a.png").write_bytes(picture(10))
    (photos / "b.png").write_bytes(picture(20)[:-40])  # with a sound header
    found, (reject,) = encoded(photos, out, size=16)
    assert ([name for _, name in found], reject["path"]) == (["a.png"], f"{photos}/b.png")
    (photos / "b.png").write_bytes(picture(20))
    (out / reject["shard"]).unlink()
    found, rejects = encoded(photos, out, size=16)
    assert ([name for _, name in found], rejects) == (["a.png", "b.png"], [])


# --- the same twice


@pytest.fixture
def nested(tmp_path):
    """A folder with pictures, and latents of another program, in it and in a folder within."""
    for name, grey in (("a", 10), ("b", 20), ("sub/c", 30)):
        path = tmp_path / f"photos/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").write_bytes(picture(grey))
        np.savez(path.with_suffix(".npz"), latents=np.zeros((4, 8, 8), np.float32))
    return tmp_path / "photos"


@pytest.mark.parametrize("inner", ["", "sub"])
@pytest.mark.parametrize(("imported", "suffix"), [(None, "png"), ("raw", "npz")])
def test_a_picture_that_two_sources_hold_is_refused(nested, tmp_path, inner, imported, suffix):
    with pytest.raises(ValueError, match=rf"photos/.*\.{suffix}: named twice.*no folder within another"):
        prepare(
            [str(nested), str(nested / inner)], tmp_path / "store", tiny_codec(), imported=imported, **SMALL
        )


@pytest.mark.parametrize("imported", [None, "raw"])
def test_a_folder_within_one_that_a_store_has_brings_nothing_new(nested, tmp_path, imported):
    found, _ = encoded(nested, tmp_path / "store", imported=imported)
    assert len(found) == 3
    assert encoded(nested / "sub", tmp_path / "store", imported=imported)[0] == found


def test_a_tar_beside_pictures_may_be_named_together_with_its_folder(nested):
    shard = tar(nested / "one.tar", [("t.png", picture(90))])
    listed = list_entries([str(nested), str(shard)])
    assert (greys(listed), left_out(listed)) == ([10, 20, 30, 90], {})
