"""A dry run of an encoding: it writes nothing, and counts and measures what there is to do."""

import shutil

import pytest
import torch
from small_commands import ENCODE, encode_the_photographs, last

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def store(place):
    return encode_the_photographs(place)


def test_a_dry_run_writes_nothing(place, tmp_path, call):
    arguments = (
        "encode",
        place / "photos",
        "--codec",
        place / "codec",
        "--out",
        tmp_path / "store",
        "--dry-run",
    )
    code, out, _ = call(*arguments, "--json")
    line = last(out)
    assert (code, line["items"], line["shards"], line["rejected"]) == (0, 5, 1, 0)
    assert 5 * 4 * 64 * 2 < line["bytes"] < 2 * (5 * 4 * 64 * 2)  # latents, and what a row has beside
    assert line["seconds"] >= 0
    assert not (tmp_path / "store").exists()


def test_a_dry_run_counts_what_is_still_to_do(place, store, tmp_path, call):
    arguments = ("encode", place / "photos", "--codec", place / "codec", *ENCODE, "--dry-run", "--json")
    code, out, _ = call(*arguments, "--out", store)
    line = last(out)
    assert (code, line["items"], line["shards"], line["bytes"], line["seconds"]) == (0, 0, 0, 0, 0)
    shutil.copytree(store, tmp_path / "store")
    next((tmp_path / "store").glob("shards/*/000002.arrow")).unlink()
    line = last(call(*arguments, "--out", tmp_path / "store")[1])
    assert (line["items"], line["shards"]) == (1, 1)
    assert 4 * 64 * 2 < line["bytes"] < 2 * (4 * 64 * 2)
    assert line["seconds"] > 0


def test_a_dry_run_measures_as_the_plan_will_encode(place, tmp_path, call, monkeypatch):
    """In its precision, on its device and with its threads; not with the codec as it was loaded."""
    tried = []

    def encode_batch(codec, pictures, settings):
        tried.append((codec.device.type, codec.dtype, torch.get_num_threads()))
        return {"latent": torch.ones(len(pictures), 4, 8, 8)}

    monkeypatch.setattr("latentcodec.store.estimate.encode_batch", encode_batch)
    arguments = ("encode", place / "photos", "--codec", place / "codec", "--out", tmp_path / "s", "--dry-run")
    machine = ("--device", "meta", "--precision", "bfloat16", "--threads", 2)
    assert call(*arguments, *machine)[0] == 0
    assert tried == [("meta", torch.bfloat16, 2)] * 2
    assert torch.get_num_threads() == 1
