"""Files of latents that are broken, hostile or of another kind are named with the reason, by import and by decode."""

import numpy as np
import pytest
import torch
from stores import SMALL, tiny_codec

from latentcodec.pixels import UnreadableImage
from latentcodec.store import LatentStore, encode, prepare
from latentcodec.store.caches import read_cache, read_latents

GOOD = np.zeros((4, 8, 8), np.float32)
ARRAYS = {
    "whole numbers": {"latents": GOOD.astype(np.int8)},
    "words": {"latents": np.array(["a", "b"])},
    "complex numbers": {"latents": GOOD.astype(np.complex64)},
    "dates": {"latents": GOOD.astype("datetime64[s]")},
    "not a number": {"latents": GOOD * np.nan},
    "nothing": {"latents": GOOD[:, :0]},
}
OF_THE_PICTURE = {
    "a size of one number": {"latents": GOOD, "original_size": np.array([3])},
    "a size that is not a number": {"latents": GOOD, "original_size": np.array([np.nan, 1])},
    "a size beyond all": {"latents": GOOD, "original_size": np.array([np.inf, 1])},
    "a cut without a side": {"latents": GOOD, "crop_ltrb": np.array(3)},
}
OBJECTS = {"None": None, "a number": 3, "a word": "latents", "a list": [1], "no tensor": {"latents": 3}}


@pytest.mark.parametrize("kind", ARRAYS | OF_THE_PICTURE)
def test_a_broken_npz_cache_is_named(tmp_path, kind):
    np.savez(tmp_path / "a.npz", **(ARRAYS | OF_THE_PICTURE)[kind])
    with pytest.raises(UnreadableImage, match=r"a\.npz: "):
        read_cache(tmp_path / "a.npz")
    if kind in ARRAYS:
        with pytest.raises(ValueError, match=r"a\.npz: "):
            read_latents(tmp_path / "a.npz")


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_pt_file_without_latents_is_named(tmp_path, kind):
    torch.save(OBJECTS[kind], tmp_path / "a.pt")
    for read in (read_cache, read_latents):
        with pytest.raises(ValueError, match=r"a\.pt: cannot be read"):
            read(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"PK\3\4", bytes(100), b"\x93NUMPY\1\0"], ids=["empty", "zip", "zeros", "npy"]
)
def test_what_is_no_file_of_latents_is_named(tmp_path, suffix, content):
    (tmp_path / f"a{suffix}").write_bytes(content)
    for read in (read_cache, read_latents):
        with pytest.raises(ValueError, match=rf"a\{suffix}: cannot be read"):
            read(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("imported", ["raw", "normalised"])
def test_latents_of_another_shape_than_the_codec_or_the_plan_has_are_left_out_by_name(tmp_path, imported):
    cache, out, codec = tmp_path / "cache", tmp_path / "store", tiny_codec()
    cache.mkdir()
    for name, channels in (("good", 4), ("later", 4), ("of one", 1), ("of sixteen", 16)):
        np.savez(cache / f"{name}.npz", latents=np.ones((channels, 8, 8), np.float32))
    prepare([str(cache)], out, codec, imported=imported, **SMALL)
    np.savez(cache / "later.npz", latents=np.ones((4, 6, 8), np.float32))
    encode(out, codec, workers=0)
    assert [item.id for item in LatentStore(out)] == ["good.npz"]
    reasons = (out / "rejects.jsonl").read_text()
    assert f"{cache}/of one.npz: a latent (1, 8, 8), those of this codec have 4 channels" in reasons
    assert f"{cache}/of sixteen.npz: a latent (16, 8, 8)" in reasons
    assert f"{cache}/later.npz: a latent (4, 6, 8), (4, 8, 8) is what this store was planned for" in reasons
