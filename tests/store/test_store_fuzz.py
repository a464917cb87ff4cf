"""The short form of `fuzz_store.py`: damaged pictures, shards, indexes and plans."""

import pytest
from fuzz_store import faults, fuzz_pictures, fuzz_store


@pytest.mark.filterwarnings("ignore")  # of damaged EXIF data and colour profiles
def test_damaged_pictures_are_refused_or_give_finite_latents():
    tally = fuzz_pictures(250, seed=1)
    assert not faults(tally), tally
    assert tally["refused"]
    assert tally["latent"]


def test_damaged_stores_are_refused_or_read_rightly(tmp_path):
    tally = fuzz_store(250, 1, tmp_path)
    assert not faults(tally), tally
    assert tally["refused"] > 100
