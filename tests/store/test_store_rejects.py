"""Bad pictures are listed and left out; a source that is gone and a fault of the machine are not blamed on pictures."""

import errno
import json
import os

import pytest
import torch
from image_sets import write_bad_files, write_tar
from PIL import Image
from stores import SMALL, digest, make, write_pictures

from latentcodec.pixels import decode, load_image
from latentcodec.store import LatentStore, encode, prepare

pytestmark = pytest.mark.filterwarnings("default")  # of damaged EXIF data in the bad pictures


@pytest.mark.parametrize("settings", [{"size": 32}, {}])
def test_bad_pictures_are_listed_and_their_neighbours_are_not_lost(tmp_path, codec, settings):
    photos = write_pictures(tmp_path / "photos", 6)
    make([photos], tmp_path / "clean", codec, **settings)
    bad = write_bad_files(photos)
    (photos / "001.txt").write_bytes(b"\xff\xfe")  # a caption that is no text
    job = make([photos], tmp_path / "store", codec, **settings)
    listed = [json.loads(line) for line in (tmp_path / "store/rejects.jsonl").read_text().splitlines()]
    assert sorted(reject["path"] for reject in listed) == sorted([*map(str, bad), str(photos / "001.png")])
    assert all(reject["reason"].startswith(reject["path"]) for reject in listed)
    assert job.index.rejected == len(bad) + 1
    clean, store = LatentStore(tmp_path / "clean"), LatentStore(tmp_path / "store")
    expected = {item.id: item.latent for item in clean if item.id != "001.png"}
    assert {item.id for item in store} == set(expected)
    assert all(torch.equal(item.latent, expected[item.id]) for item in store)


def test_a_latent_that_is_not_finite_is_left_out(tmp_path, codec, monkeypatch):
    photos = write_pictures(tmp_path / "photos", 3)
    bad = load_image(photos / "001.png")

    def broken(self, x):
        mean = self.encode(x)
        mean[(x == bad).flatten(1).all(1)] = 1e6  # infinite in float16
        return mean, mean

    monkeypatch.setattr(type(codec), "posterior", broken)
    job = make([photos], tmp_path / "store", codec)
    assert [item.id for item in LatentStore(tmp_path / "store")] == ["000.png", "002.png"]
    assert job.index.rejected == 1


def test_too_small_and_too_elongated_pictures(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 2, sizes=((32, 32), (64, 64)))
    Image.new("RGB", (9000, 2)).save(photos / "line.png")
    job = make([photos], tmp_path / "store", codec, size=48, min_side=2)
    assert job.index.rejected == 1
    job = make([photos], tmp_path / "other", codec, size=48, min_side=48)
    assert job.index.rejected == 2


@pytest.mark.parametrize("place", ["gone", "empty"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_is_gone_is_no_folder_of_broken_pictures(tmp_path, codec, place, workers):
    """As a disk that is not mounted when an encoding goes on; its folder may stay, and be empty."""
    photos, out = write_pictures(tmp_path / "photos", 5), tmp_path / "store"
    make([photos], tmp_path / "peace", codec, size=32)
    prepare([str(photos)], out, codec, size=32, **SMALL)
    photos.rename(tmp_path / "away")
    if place == "empty":
        photos.mkdir()
    with pytest.raises(OSError, match=rf"the source {photos} is {place}.*the same command goes on") as raised:
        encode(out, codec, workers=workers)
    assert "Traceback" not in str(raised.value)
    assert not list(out.glob("shards/*/*.arrow"))
    if place == "empty":
        photos.rmdir()
    (tmp_path / "away").rename(photos)
    make([photos], out, codec, size=32)
    assert digest(out) == digest(tmp_path / "peace")


def test_a_tar_that_is_gone_stops_the_encoding(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 2)
    write_tar(tmp_path / "set.tar", {path.name: path.read_bytes() for path in photos.iterdir()})
    prepare([str(tmp_path / "set.tar")], tmp_path / "store", codec, **SMALL)
    (tmp_path / "set.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"the source .*set\.tar is gone"):
        encode(tmp_path / "store", codec, workers=0)


def test_one_file_that_is_gone_is_left_out(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 3)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    (photos / "001.png").unlink()
    assert encode(tmp_path / "store", codec, workers=0).index.rejected == 1


FAULTS = [OSError(number, os.strerror(number)) for number in (errno.EIO, errno.ESTALE, errno.EMFILE)]


@pytest.mark.parametrize("fault", [*FAULTS, MemoryError()], ids=str)
@pytest.mark.parametrize("size", [32, None])
def test_what_is_wrong_with_the_machine_is_not_blamed_on_a_picture(tmp_path, codec, monkeypatch, fault, size):
    """While headers are read for the plan (without a size for all), and while pictures are decoded."""
    photos, out = write_pictures(tmp_path / "photos", 3), tmp_path / "store"
    if size is not None:
        prepare([str(photos)], out, codec, size=size, **SMALL)

    def failing(source, name):
        raise fault

    monkeypatch.setattr(decode, "open_image", failing)
    with pytest.raises(OSError, match=r"photos/00\d\.png: .*the same command goes on"):
        make([photos], out, codec, size=size)
    monkeypatch.undo()
    assert make([photos], out, codec, size=size).index.items == 3
