"""A store goes through an object store and comes back the same, each shard as one object."""

import fsspec
from stores import SMALL, digest, tiny_codec, write_pictures

from latentcodec.store import LatentStore, encode, prepare, verify


def test_a_store_that_went_through_an_object_store_is_the_same(tmp_path):
    photos, codec = write_pictures(tmp_path / "photos", 9), tiny_codec()
    prepare([str(photos)], tmp_path / "latents", codec, **SMALL)
    encode(tmp_path / "latents", codec, workers=0)
    objects = fsspec.filesystem("memory")
    objects.put(f"{tmp_path}/latents/", "/bucket/latents", recursive=True)
    shards = {path.split("/shards/")[1] for path in objects.find("/bucket/latents/shards")}
    assert shards == {
        entry.file.removeprefix("shards/") for entry in LatentStore(tmp_path / "latents").index.shards
    }
    objects.get("/bucket/latents/", f"{tmp_path}/back/", recursive=True)
    assert digest(tmp_path / "back") == digest(tmp_path / "latents")
    assert verify(tmp_path / "back").ok
    assert len(LatentStore(tmp_path / "back", check=True)) == 9
