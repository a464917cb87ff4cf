"""The codec in the folder of a store: it is the plan's, and that of somebody else is left alone."""

import pytest
import torch
from stores import SMALL, digest, make, tiny_codec, write_pictures

from latentcodec.store import LatentStore, StoreError, encode, prepare
from latentcodec.store.plan import Plan


@pytest.fixture
def photos(tmp_path):
    return write_pictures(tmp_path / "photos", 6)


@pytest.fixture
def store(photos, tmp_path, codec):
    """Six pictures in shards of four and two."""
    make(photos, tmp_path / "store", codec)
    return tmp_path / "store"


def test_every_part_is_encoded_in_its_own_precision(store, photos, codec):
    write_pictures(photos, 4, first=6)
    with torch.no_grad():
        make(photos, store, codec, precision="bfloat16")
    expected = digest(store)
    next(store.glob("shards/*/*00.arrow")).unlink()
    encode(store, workers=0)
    assert [part.machine["precision"] for part in Plan.load(store).parts] == ["float32", "bfloat16"]
    assert digest(store) == expected


@pytest.mark.parametrize("harm", ["none", "no weights", "cut", "another", "no config"])
def test_the_codec_of_a_store_is_the_plans(photos, tmp_path, codec, harm):
    store = tmp_path / "store"
    prepare([str(photos)], store, codec, **SMALL)
    folder = store / "codec"
    weights = folder / "diffusion_pytorch_model.safetensors"
    if harm == "no weights":
        weights.unlink()
    elif harm == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif harm == "another":
        tiny_codec(seed=1).save_pretrained(folder)
    elif harm == "no config":
        (folder / "config.json").unlink()
    make(photos, store, codec)
    assert LatentStore(store).codec().fingerprint == codec.fingerprint


def test_another_codec_than_the_plans_is_kept_out(photos, tmp_path, codec):
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    with pytest.raises(StoreError, match="begun with"):
        prepare([str(photos)], tmp_path / "store", tiny_codec(seed=1), **SMALL)
    assert tmp_path.joinpath("store", "codec", "config.json").exists()
    encode(tmp_path / "store", workers=0)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["another codec", "a file"])
def test_the_codec_folder_of_somebody_else_is_left_alone(photos, tmp_path, codec, what):
    """As a training has one, in the folder of its run."""
    folder = tmp_path / "run/codec"
    if what == "a file":
        folder.parent.mkdir()
        folder.write_text("mine")
    else:
        tiny_codec(seed=1).save_pretrained(folder)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=r"run/codec: is there already.*--out.*--no-codec"):
        prepare([str(photos)], tmp_path / "run", codec, **SMALL)
    assert contents(tmp_path) == before
    prepare([str(photos)], tmp_path / "run", codec, **SMALL, keep_codec=False)
    assert encode(tmp_path / "run", codec, workers=0).index.items == 6


def test_this_codec_may_lie_there_before_the_store(photos, tmp_path, codec):
    codec.save_pretrained(tmp_path / "run/codec", card="mine")
    assert make(photos, tmp_path / "run", codec).index.items == 6
    assert (tmp_path / "run/codec/README.md").read_text() == "mine"


def test_a_damaged_codec_is_not_replaced_together_with_files_of_others(photos, store, codec):
    weights, note = (store / "codec" / name for name in ("diffusion_pytorch_model.safetensors", "note.txt"))
    weights.write_bytes(b"cut")
    note.write_text("mine")
    with pytest.raises(StoreError, match=r"codec/note\.txt: no file of a codec.*move"):
        make(photos, store, codec)
    assert note.read_text() == "mine"
    note.unlink()
    make(photos, store, codec)
    assert LatentStore(store).codec().fingerprint == codec.fingerprint
