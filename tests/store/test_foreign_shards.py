"""Files of a store that were moved, exchanged or edited are named; nothing of another store is taken for its own."""

import shutil

import pytest
from stores import SMALL, tiny_codec, write_pictures

from latentcodec.store import LatentStore
from latentcodec.store.finishing import finish
from latentcodec.store.format import StoreError
from latentcodec.store.job import encode, prepare


def make(photos, out, codec=None):
    prepare([str(photos)], out, codec or tiny_codec(), size=32, **SMALL)
    encode(out, workers=0)
    return LatentStore(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    photos = write_pictures(place / "photos", 9)
    make(photos, place / "ours")
    make(photos, place / "other codec", tiny_codec(seed=1))
    make(write_pictures(place / "more", 9, first=20), place / "other pictures")
    return place


@pytest.fixture
def ours(made, tmp_path):
    return shutil.copytree(made / "ours", tmp_path / "store")


@pytest.mark.parametrize("source", ["ours", "other codec"])
def test_a_shard_in_the_place_of_another_is_refused(made, ours, source):
    shards = ours / "shards/4x8x8"
    place, number = ("000000", "000001") if source == "ours" else ("000000", "000000")
    shutil.copy(made / source / f"shards/4x8x8/{number}.arrow", shards / f"{place}.arrow")
    with pytest.raises(StoreError, match=r"000000\.arrow: this file is shard .* moved or copied"):
        LatentStore(ours)[0]
    (ours / "index.json").unlink()
    with pytest.raises(StoreError, match=r"000000\.arrow: this file is shard .* moved or copied"):
        finish(ours)


def test_a_shard_of_other_pictures_is_not_finished(made, ours):
    shutil.copy(made / "other pictures/shards/4x8x8/000001.arrow", ours / "shards/4x8x8/000001.arrow")
    (ours / "index.json").unlink()
    with pytest.raises(StoreError, match=r"000001\.arrow: holds other pictures"):
        finish(ours)


@pytest.mark.parametrize("source", ["ours", "other codec"])
def test_a_part_of_a_plan_that_was_copied_is_not_encoded_again(made, ours, source):
    shutil.copy(made / source / "plan/0000.arrow", ours / "plan/0001.arrow")
    with pytest.raises(StoreError, match=r"0001\.arrow: begins with shard 0, not 3"):
        encode(ours, workers=0)


def test_dropped_pictures_are_no_other_pictures(ours):
    finish(ours, drop=["003.png"])
    (ours / "index.json").unlink()
    assert finish(ours).items == 8


DAMAGED = {"empty": "", "object": "{}", "number": "[1]", "no source": '["a"]', "no end": "[" * 100_000}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_list_of_dropped_pictures_is_named(ours, content):
    (ours / "dropped.json").write_text(content)
    with pytest.raises(StoreError, match=r"dropped\.json: damaged"):
        finish(ours)
