"""Reading: items and batches, and damage that is found."""

import random
import shutil

import pytest
import torch
from stores import make_and_open as make
from stores import tiny_codec
from torch.utils.data import DataLoader

from latentcodec.pixels import load_image
from latentcodec.store import LatentStore, StoreError, encode, verify

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


# --- damage


def damaged(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << random.Random(offset).randrange(8)
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
