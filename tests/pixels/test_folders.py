"""A folder's pictures are found, and what looks like a picture and is not read is listed with the reason."""

import os
from pathlib import Path

import pytest

from latentcodec.pixels import find_images, search_folder
from latentcodec.pixels.folders import counted


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n")


def reasons(folder):
    return {Path(item.path).name: item.reason for item in search_folder(folder).left_out}


def test_pictures_of_kinds_that_are_not_read_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("latentcodec.pixels.folders.enable", lambda plugin: False)
    fill(
        tmp_path,
        "a.jpg",
        "b.HEIC",
        "c.heif",
        "d.jxl",
        "e.jp2",
        "f.psd",
        "g.CR2",
        "h.zip",
        "i.txt",
        "j.json",
        ".k.heic",
    )
    found = reasons(tmp_path)
    assert found.keys() == {"b.HEIC", "c.heif", "d.jxl", "e.jp2", "f.psd", "g.CR2", "h.zip"}
    assert "pillow-heif: pip install" in found["b.HEIC"]
    assert "pillow-jxl-plugin: pip install" in found["d.jxl"]
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg"]


def test_with_the_extra_its_formats_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("latentcodec.pixels.folders.enable", lambda plugin: True)
    fill(tmp_path, "a.jpg", "b.HEIC", "c.jxl")
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg", "b.HEIC", "c.jxl"]
    assert reasons(tmp_path) == {}


def test_what_is_no_file_is_listed_and_not_opened(tmp_path):
    fill(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "d.png").symlink_to(tmp_path / "nowhere.png")  # reading it will say so
    os.mkfifo(tmp_path / "e.tar")
    assert reasons(tmp_path) == {
        "b.png": "a FIFO, which is never opened",
        "c.png": "a device, which is never opened",
        "e.tar": "a FIFO, which is never opened",
    }
    assert [path.name for path in find_images(tmp_path)] == ["a.png", "d.png"]


def test_a_picture_without_the_suffix_of_one_is_listed(tmp_path):
    pictures = ["0a1b2c", "b.jpg?w=200", "c.jpeg~", "d.png.bak", "e.download", "f.jpg!d", "g.bin"]
    fill(tmp_path, "a.png", *pictures, "LICENSE", "weights.bin", "notes.txt")
    (tmp_path / "LICENSE").write_text("MIT")
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.tmp")
    reason = "a picture whose name has not the suffix of one; rename it"
    assert reasons(tmp_path) == dict.fromkeys(pictures, reason)


def test_a_folder_of_other_kinds_says_what_it_holds(tmp_path):
    fill(tmp_path, "a.jp2", "b.jp2", "c.zip")
    with pytest.raises(
        ValueError, match=r"no image .*left out: 2 \(\.jp2 files are not read.*1 \(\.zip archives"
    ):
        find_images(tmp_path)


def test_links_to_folders_are_not_followed(tmp_path):
    fill(tmp_path / "a", "x.png")
    (tmp_path / "a" / "loop.png").symlink_to(tmp_path / "a")
    assert [path.name for path in find_images(tmp_path / "a")] == ["x.png"]
    assert reasons(tmp_path / "a") == {
        "loop.png": "a link to a folder, which is not followed; give the folder that it leads to"
    }


def test_reasons_are_counted_the_most_frequent_first(tmp_path):
    fill(tmp_path, "a.psd", "b.jp2", "c.jp2")
    assert counted(search_folder(tmp_path).left_out) == (
        "2 (.jp2 files are not read; convert them), 1 (.psd files are not read; convert them)"
    )
