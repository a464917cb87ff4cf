"""The files of decoded pictures: each has its own, inside the folder."""

from pathlib import Path

import pytest
from PIL import Image
from stores import SMALL, tiny_codec

from latentcodec.cli import run
from latentcodec.cli.decode import Names
from latentcodec.store.job import encode, prepare


def names(*pictures):
    found = Names((source for source, _ in pictures), ".png")
    return [found.of(*picture).as_posix() for picture in pictures]


def test_pictures_of_one_stem_keep_their_own_files():
    assert names(("/x", "a.jpg"), ("/x", "a.png"), ("/x", "a"), ("/x", "b/a.png")) == [
        "a.png",
        "a.png.png",
        "a-1.png",
        "b/a.png",
    ]


def test_sources_of_one_name_have_their_own_folders():
    assert names(("/x/photos", "a.png"), ("/y/photos", "a.png"), ("/z.tar", "a.png")) == [
        "photos/a.png",
        "photos-2/a.png",
        "z.tar/a.png",
    ]


@pytest.mark.parametrize("picture", ["/etc/a.png", "../../a.png", "./a.png", "//a.png", "b/../../a.png"])
def test_no_id_leads_out_of_the_folder(picture):
    (name,) = names(("/x", picture))
    assert (Path("/out") / name).resolve().is_relative_to("/out")
    assert name.endswith("a.png")


def test_long_names_fit():
    (name,) = names(("/x", "é" * 300 + ".png"))
    assert len(name.encode()) < 255


def test_a_store_of_pictures_with_one_stem_is_decoded_in_full(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, name in enumerate(("a.png", "a.jpg", "a.bmp")):
        Image.new("RGB", (16, 16), (number * 90,) * 3).save(photos / name)
    prepare([str(photos)], tmp_path / "store", tiny_codec(), size=16, **SMALL)
    encode(tmp_path / "store", workers=0)
    assert run(["decode", str(tmp_path / "store"), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 3
