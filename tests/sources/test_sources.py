"""Where images come from: every container gives the same images, and every mistake an error that names it."""

import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_sets import (
    assert_same_stream,
    config_of,
    numbers_in,
    plain,
    read,
    table,
    write_bad_files,
    write_set,
    write_tar,
)
from PIL import Image

from latentcodec.pixels import UnreadableImage, decode_image
from latentcodec.sources.images import DatasetSource, Place
from latentcodec.sources.images import open_source as open_place
from latentcodec.training.data.images import held_out, open_images
from latentcodec.training.data.stream import training_batches


def open_source(path, split="train", column=None, channels=3):
    return open_place(Place(str(path), split=split), column, channels)


@pytest.mark.parametrize("kind", ["saved", "saved splits", "parquet", "parquet folder", "tar"])
def test_the_same_images_in_another_container_give_the_same_stream(tmp_path, kind):
    folder, other = (write_set(tmp_path, form, range(12)) for form in ("folder", kind))
    expected = read(config_of(folder), steps=4)
    assert_same_stream(read(config_of(other, workers=2), steps=4), expected)
    sizes = [[open_source(path).size(index) for index in range(12)] for path in (folder, other)]
    assert sizes[0] == sizes[1] == [(20, 24)] * 12


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_corrupt_rows_of_a_data_set_are_listed_and_stop_nothing(tmp_path, kind):
    cells = [{"bytes": plain(number), "path": None} for number in range(12)]
    cells[4], cells[9] = {"bytes": b"broken", "path": "9.png"}, None
    path = write_set(tmp_path, kind, range(12), cells)
    batches = read(config_of(path), steps=3)
    lines = sorted({f"{path}: {reason}" for batch in batches for path, reason in batch["rejects"]})
    assert [line.split(": ")[0] for line in lines] == [f"{path} [train] row {row}" for row in (4, 9)]
    assert {number for batch in batches for number in numbers_in(batch)} == set(range(12)) - {4, 9}


@pytest.mark.parametrize("kind", ["saved", "parquet", "tar", "folder"])
def test_lengths_are_those_of_the_files(tmp_path, kind):
    source = open_source(write_set(tmp_path, kind, range(3)))
    assert source.lengths() == [len(source.content(index)) for index in range(3)]


def test_the_length_of_what_is_no_file_is_negative(tmp_path):
    (tmp_path / "here.png").write_bytes(plain(1))
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("here.png", "nowhere.png")]
    source = DatasetSource(table(range(3), [*cells, None]), "set", None, 3)
    assert source.lengths() == [len(plain(1)), -1, -1]
    for index in (1, 2):
        with pytest.raises(UnreadableImage, match=f"row {index}"):
            source.content(index)


def test_splits_and_slices_of_splits_are_understood(tmp_path):
    path = str(write_set(tmp_path, "parquet folder", range(12)))
    assert len(open_source(path, "train")) == 12
    assert len(open_source(path, "train[:5]")) == 5
    images = open_images(config_of(path, val_split="validation", val_images=4), 3, 0)
    assert len(images.train) == 12
    assert numbers_in({"pixels": torch.stack(held_out(images).images)}) == [999]


def test_tar_shards_choose_images_by_the_part_after_the_dot(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.left.png": plain(1), "x.right.png": plain(2), "x.json": b"{}"})
    write_tar(tmp_path / "b.tar", {"._x.png": b"resource fork", "deep/y.JPG": plain(3)})
    assert [open_source(tmp_path).name(i) for i in range(3)] == [
        f"{tmp_path}/{name}" for name in ("a.tar:x.left.png", "a.tar:x.right.png", "b.tar:deep/y.JPG")
    ]
    assert len(open_source(tmp_path / "a.tar", column="right.png")) == 1
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert len(open_source(tmp_path)) == 3
    with pytest.raises(ValueError, match=r"no image named \*\.webp"):
        open_source(tmp_path, column="webp")


def test_size_is_that_of_the_image_as_it_is_read(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (30, 20)).save(tmp_path / f"{orientation}.jpg", exif=exif)
    source = open_source(tmp_path)
    assert [source.size(index) for index in range(8)] == [source.read(index).shape[1:] for index in range(8)]
    assert [source.size(index)[0] for index in range(8)] == [20] * 4 + [30] * 4


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_colour_transparent_and_16_bit_files_share_a_stream(tmp_path, channels):
    grey16 = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    Image.fromarray(grey16).save(tmp_path / "grey16.png")
    for mode in ("L", "RGB", "RGBA", "P", "1", "LA"):
        Image.new(mode, (40, 40)).save(tmp_path / f"{mode}.png")
    Image.new("CMYK", (40, 40)).save(tmp_path / "cmyk.jpg")
    images = open_images(config_of(tmp_path), channels, 0)
    (batch,) = training_batches(images, 8, steps=1)
    assert batch["pixels"].shape == (8, channels, 16, 16)
    assert batch["rejects"] == []
    (grey16,) = (index for index in range(8) if "grey16" in images.source.name(index))
    assert len(images.source.read(grey16)[0].unique()) == 1600, "16 bits are not cut to 8"


def test_drawn_set_needs_no_path_and_has_any_number_of_channels():
    for channels in (1, 2, 3, 5):
        (batch,) = training_batches(open_images(config_of(None), channels, 0), 2, steps=1)
        assert batch["pixels"].shape == (2, channels, 16, 16)


def test_unreadable_image_is_the_only_error_a_source_may_raise_for_one_image(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_bad_files(folder)
    source = open_source(folder)
    for index in range(len(source)):
        with pytest.raises(UnreadableImage):
            source.read(index)


def test_the_images_of_a_shard_that_is_gone_are_unreadable_one_by_one(tmp_path):
    """As a file of a folder is, so that those of the other shards take their places."""
    folder = write_set(tmp_path, "tar", range(6))
    source = open_source(folder)
    (folder / "0.tar").unlink()
    for ask in (source.read, source.size, source.content):
        with pytest.raises(UnreadableImage, match=r"0\.tar:0001\.png: No such file or directory"):
            ask(1)
    assert source.read(4).shape == (3, 20, 24)


def test_errors_name_the_path_and_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 is how it starts")
    (tmp_path / "broken.tar").write_bytes(b"x" * 3000)
    path = str(write_set(tmp_path, "parquet folder", range(3)))
    saved = str(write_set(tmp_path, "saved splits", range(3)))
    cases = {
        ("/no/such/folder",): "/no/such/folder: no such file or folder",
        (str(tmp_path / "empty"),): "empty: holds no image",
        (str(tmp_path / "notes.txt"),): r"notes.txt: .*\.parquet or \.tar",
        (str(tmp_path / "broken.parquet"),): r"broken.parquet \[train\]: .*magic bytes",
        (str(tmp_path / "broken.tar"),): "broken.tar: not a whole, uncompressed tar file",
        (
            "someone/some-set",
        ): r"someone/some-set \[train\]: it is no file or folder here, and on the hub: Couldn't",
        (path, "test"): r"\[test\]: Unknown split.*'train', 'validation'",
        (saved, "test"): r"\[test\]: its splits are: train",
        (path, "train", "photo"): "no column 'photo'.*picture, label",
    }
    for arguments, message in cases.items():
        with pytest.raises(ValueError, match=message):
            open_source(*arguments)
    with pytest.raises(ValueError, match=r"2 channels|not 2"):
        open_source(path, channels=2)


def test_a_data_set_with_no_or_several_columns_of_images_lists_its_columns(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(ValueError, match=r"no column declared as images.*data.image_column.*text, label"):
        open_source(tmp_path / "texts")
    both = datasets.concatenate_datasets(
        [table(range(3)), table(range(3)).select_columns("picture").rename_column("picture", "mask")], axis=1
    )
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"2 columns of images.*picture, label, mask"):
        open_source(tmp_path / "both")
    assert len(open_source(tmp_path / "both", column="mask")) == 3


def test_raw_bytes_become_images_when_their_column_is_named(tmp_path):
    datasets.Dataset.from_dict({"raw": [plain(1), plain(2)]}).to_parquet(tmp_path / "raw.parquet")
    source = open_source(tmp_path / "raw.parquet", column="raw")
    assert torch.equal(source.read(1), decode_image(plain(2)))


def test_a_data_set_with_subsets_is_asked_for_one_of_them(tmp_path):
    for name in ("cats", "dogs"):
        table(range(3)).to_parquet(tmp_path / f"{name}.parquet")
    blocks = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("cats", "dogs"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{blocks}---\n")
    with pytest.raises(ValueError, match=r"Config name is missing.*cats.*dogs"):
        open_images(config_of(tmp_path), 3, 0)
    assert len(open_images(config_of(tmp_path, subset="dogs"), 3, 0).train) == 3


def test_what_the_library_met_in_a_data_set_is_said(tmp_path):
    pq.write_table(
        pa.table([pa.array([b"a"]), pa.array([b"b"])], names=["image", "image"]), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match=r"a\.parquet.*Multiple matches"):
        open_place(Place(str(tmp_path / "a.parquet")))
