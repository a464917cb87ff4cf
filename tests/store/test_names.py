"""The files of decoded pictures: each has its own, inside the folder."""

import tarfile
from pathlib import Path

import pytest
from PIL import Image
from stores import SMALL, tiny_codec

from latentcodec.cli import run
from latentcodec.cli.names import Names
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


def test_a_source_whose_name_is_a_numbered_one_keeps_a_folder_of_its_own():
    assert names(("/a/photos-2", "a.png"), ("/b/photos", "a.png"), ("/c/photos", "a.png")) == [
        "photos-2/a.png",
        "photos/a.png",
        "photos-3/a.png",
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


def test_comparisons_do_not_overwrite_one_another_and_none_is_passed_over(tmp_path, capsys):
    tiny_codec().save_pretrained(tmp_path / "codec")
    photos = tmp_path / "photos"
    for number, name in enumerate(("a-1.jpg", "a.jpg", "a.png", "sub/a.jpg")):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number * 60,) * 3).save(photos / name)
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        tar.add(photos / "a.jpg", "a.jpg")
    others = ("--codec", tmp_path / "codec", "--out", tmp_path / "out")
    for sources, expected in (
        ([photos], {"a-1.png", "a.png", "a.png.png", "sub/a.png"}),
        (
            [photos / "a.png", photos / "sub/a.jpg", tmp_path / "more.tar"],
            {"photos/a.png", "sub/a.png", "more.tar/a.png"},
        ),
    ):
        assert run([str(argument) for argument in ("reconstruct", *sources, *others)]) == 0
        written = [Path(line.rpartition("-> ")[2]) for line in capsys.readouterr().out.splitlines()[:-1]]
        assert {path.relative_to(tmp_path / "out").as_posix() for path in written} == expected
        assert all(path.is_file() for path in written)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("out", ["photos", "link", "photos/a.png"])
def test_the_originals_are_not_overwritten(tmp_path, capsys, monkeypatch, out):
    """Neither by what comes of a picture itself, nor of its neighbour: a.jpg, which comes first, would become a.png."""
    tiny_codec().save_pretrained(tmp_path / "codec")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, name in enumerate(("a.jpg", "a.png") if out != "photos/a.png" else ("a.png",)):
        Image.new("RGB", (16, 16), (number * 90,) * 3).save(photos / name)
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    prepare(["photos"], "store", tiny_codec(), size=16, **SMALL)
    encode("store", workers=0)
    commands = [["reconstruct", "photos", "--codec", "codec", "--out", out]]
    if out != "photos/a.png":
        commands.append(["decode", "store", "--out", out])
    before = contents(photos)
    for command in commands:
        assert run(command) == 2
        assert f"{photos}/a.png: this picture would be overwritten" in capsys.readouterr().err
    assert contents(photos) == before


def test_pictures_are_decoded_beside_their_originals_under_other_names(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (16, 16)).save(photos / "a.jpg")
    prepare([str(photos)], tmp_path / "store", tiny_codec(), size=16, **SMALL)
    encode(tmp_path / "store", workers=0)
    for _ in range(2):  # the second time over its own
        assert run(["decode", str(tmp_path / "store"), "--out", str(photos)]) == 0
    assert {path.name for path in photos.iterdir()} == {"a.jpg", "a.png"}
