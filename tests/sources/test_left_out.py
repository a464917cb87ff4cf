"""A source lists what looks like an image of its set and is not among its images, and the larger kind is the set."""

import io
import os
import tarfile

import datasets
import pytest
import torch
from image_sets import plain, table, write_folder, write_tar

from latentcodec.pixels import decode_image
from latentcodec.sources.images import Place, open_source


def source_of(path, column=None):
    return open_source(Place(str(path)), column)


@pytest.mark.parametrize(
    ("loose", "packed", "kind"), [(5, 2, "image files"), (2, 5, "tar files"), (3, 3, "tar files")]
)
def test_of_loose_and_packed_images_the_more_are_read_and_the_others_listed(tmp_path, loose, packed, kind):
    folder = write_folder(tmp_path / "set", loose)
    write_tar(folder / "backup.tar", {f"{n}.png": plain(100 + n) for n in range(packed)})
    source = source_of(folder)
    assert len(source) == max(loose, packed)
    assert len(source.left_out) == min(loose, packed)
    assert all(f"images in {kind}, which are read" in item.reason for item in source.left_out)
    names = {source.name(i) for i in range(len(source))} | {item.path for item in source.left_out}
    assert len(names) == loose + packed


@pytest.mark.parametrize(("loose", "rows"), [(5, 2), (2, 5)])
def test_a_parquet_file_takes_over_no_larger_folder(tmp_path, loose, rows):
    folder = write_folder(tmp_path / "set", loose)
    (folder / "data").mkdir()
    table(range(100, 100 + rows)).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    source = source_of(folder)
    assert len(source) == max(loose, rows)
    assert len(source.left_out) == min(loose, rows)


@pytest.mark.parametrize("named", [True, False])
def test_parquet_files_beside_images_keep_their_splits_and_nothing_else_is_read_as_rows(tmp_path, named):
    folder = write_folder(tmp_path / "set", 2)
    for number in range(20):  # most files of the folder, which `datasets` would read in place of the rows
        (folder / f"{number}.txt").write_text("a caption")
    table(range(100, 103)).to_parquet(folder / ("train-0.parquet" if named else "a.parquet"))
    table(range(200, 204)).to_parquet(folder / ("val-0.parquet" if named else "b.parquet"))
    assert len(source_of(folder)) == (3 if named else 7)
    if named:
        assert len(open_source(Place(str(folder), split="validation"))) == 4
        assert len(open_source(Place(str(folder), split="train[:2]+validation[:1]"))) == 3


def test_what_is_beside_images_and_no_set_of_images_is_listed_with_its_error(tmp_path):
    folder = write_folder(tmp_path / "set", 3)
    (folder / "backup.tar").write_bytes(b"x" * 3000)
    source = source_of(folder)
    assert len(source) == 3
    assert [os.path.basename(item.path) for item in source.left_out] == ["backup.tar"]
    assert "uncompressed tar file" in source.left_out[0].reason


def test_other_kinds_of_pictures_in_folder_and_tar_are_listed(tmp_path):
    folder = write_folder(tmp_path / "set", 2)
    (folder / "a.jp2").touch()
    assert [item.reason for item in source_of(folder).left_out] == [".jp2 files are not read; convert them"]
    write_tar(tmp_path / "set.tar", {"a.png": plain(1), "b.jp2": b"", "c.json": b"{}"})
    assert [item.path for item in source_of(tmp_path / "set.tar").left_out] == [
        f"{tmp_path / 'set.tar'}:b.jp2"
    ]


def test_links_in_a_tar_file_are_read_or_listed(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        entry = tarfile.TarInfo("a.png")
        entry.size = len(plain(7))
        tar.addfile(entry, io.BytesIO(plain(7)))
        for name, kind in {
            "hard.png": tarfile.LNKTYPE,
            "soft.png": tarfile.SYMTYPE,
            "pipe.png": tarfile.FIFOTYPE,
        }.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "a.png"
            tar.addfile(entry)
        device = tarfile.TarInfo("device.png")
        device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 5
        tar.addfile(device)
    source = source_of(tmp_path / "set.tar")
    assert len(source) == 2
    assert torch.equal(source.read(1), decode_image(plain(7)))
    assert [item.path.rpartition(":")[2] for item in source.left_out] == [
        "soft.png",
        "pipe.png",
        "device.png",
    ]


def test_columns_that_hold_no_image_a_row_are_refused_by_name(tmp_path):
    cell = {"bytes": plain(1), "path": "1.png"}
    features = datasets.Features(
        {
            "pictures": datasets.List(datasets.Image()),
            "deep": datasets.List(datasets.List(datasets.Image())),
            "label": datasets.Value("int64"),
            "box": datasets.List(datasets.Value("float32")),
        }
    )
    rows = {"pictures": [[cell, cell]], "deep": [[[cell]]], "label": [1], "box": [[0.5]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set.parquet")
    for column, words in {
        None: "column 'pictures' holds lists of images",
        "pictures": "column 'pictures'.*lists of images.*one row for each",
        "deep": "column 'deep'.*lists of images",
        "label": "column 'label'.*int64.*are needed",
        "box": "column 'box'.*are needed",
    }.items():
        with pytest.raises(ValueError, match=words) as caught:
            source_of(tmp_path / "set.parquet", column)
        assert "\n" not in str(caught.value)


def test_a_row_that_points_to_a_device_is_no_image(tmp_path):
    cells = [{"bytes": None, "path": "/dev/zero"}, {"bytes": plain(1), "path": "1.png"}]
    kind = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = datasets.Dataset.from_dict({"picture": cells}, features=datasets.Features({"picture": kind}))
    rows.to_parquet(tmp_path / "set.parquet")
    source = source_of(tmp_path / "set.parquet", "picture")
    with pytest.raises(ValueError, match="a device, not a file"):
        source.read(0)
    with pytest.raises(ValueError, match="a device, not a file"):
        source.content(0)
    assert source.read(1).shape == (3, 20, 24)
