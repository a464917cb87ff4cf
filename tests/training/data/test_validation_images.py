"""Validation images: which are held out, that none of them is trained on, and how they are read."""

from pathlib import Path

import pytest
import torch
from image_sets import config_of, numbers_in, plain, write_folder, write_set

from latentcodec.sources.encoded import EncodedSource
from latentcodec.training.data.images import held_out, open_images
from latentcodec.training.data.stream import training_batches

# ---- held out of training ----


def test_held_out_images_never_appear_in_training(tmp_path):
    folder = write_folder(tmp_path / "set", 20)
    images = open_images(config_of(folder, val_images=5), 3, seed=1)
    seen = {number for batch in training_batches(images, 4, steps=10) for number in numbers_in(batch)}
    held = numbers_in({"pixels": torch.stack(held_out(images).images)})
    assert len(held) == 5
    assert sorted([*seen, *held]) == list(range(20))
    other = held_out(open_images(config_of(folder, val_images=5), 3, seed=2))
    assert numbers_in({"pixels": torch.stack(other.images)}) != held, "the seed chooses"


def test_validation_images_that_lie_inside_the_training_folder_are_not_trained_on(tmp_path):
    folder = write_folder(tmp_path / "set", 20)
    write_folder(folder / "val", 3)
    images = open_images(config_of(folder, val_path=str(tmp_path / "set/../set/val"), val_images=8), 3, 0)
    assert [Path(name).parent.name for name in held_out(images).names] == ["val"] * 3
    assert images.train.tolist() == list(range(3, 20)), "neither they nor the copies 0000.png to 0002.png"


def test_of_a_validation_folder_inside_the_training_folder_nothing_is_trained_on(tmp_path):
    """Not of the images either that are too many to be validated on."""
    folder = write_folder(tmp_path / "set", 20)
    (folder / "val").mkdir()
    for number in range(16, 20):
        (folder / f"{number:04}.png").rename(folder / f"val/{number}.png")
    images = open_images(config_of(folder, val_path=str(folder / "val"), val_images=1), 3, 0)
    assert [images.source.name(i) for i in images.train] == sorted(map(str, folder.glob("*.png")))
    same = open_images(config_of(folder, val_path=str(folder), val_images=1), 3, 0)
    assert len(same.train) == 19, "the set itself is no part of it"


@pytest.mark.parametrize("kind", ["parquet", "saved", "tar", "folder"])
def test_a_validation_image_is_not_trained_on_whatever_its_set_is_called(tmp_path, monkeypatch, kind):
    (tmp_path / "other").mkdir()
    other = write_set(tmp_path / "other", "folder", range(4))
    monkeypatch.chdir(tmp_path)
    path = write_set(tmp_path, kind, range(20)).relative_to(tmp_path)
    images = open_images(config_of(path, val_path=str(other), val_images=4), 3, 0)
    assert images.train.tolist() == list(range(4, 20))
    images = open_images(config_of(path, val_path=str(path.resolve()), val_images=4), 3, 0)
    assert len(images.train) == 16


def test_a_slice_of_the_training_split_is_not_trained_on(tmp_path):
    path = write_set(tmp_path, "parquet", range(20))
    images = open_images(config_of(path, val_split="train[:4]", val_images=4), 3, 0)
    assert images.train.tolist() == list(range(4, 20))


def test_holding_everything_out_is_an_error(tmp_path):
    folder = write_folder(tmp_path / "set", 4)
    with pytest.raises(ValueError, match=r"set: of 4 images 4 are held out.*data.val_images"):
        open_images(config_of(folder, val_images=16), 3, 0)


# ---- how they are read ----


def test_only_images_as_long_as_a_validation_image_are_read_at_the_start(tmp_path, monkeypatch):
    cells = [{"bytes": plain(number) + bytes(number), "path": None} for number in range(20)]
    cells[7] = None
    path = write_set(tmp_path, "parquet", range(20), cells)
    read, content = [], EncodedSource.content
    monkeypatch.setattr(EncodedSource, "content", lambda self, i: read.append(i) or content(self, i))
    images = open_images(config_of(path, val_split="train[:1]", val_images=1), 3, 0)
    assert images.train.tolist() == list(range(1, 20))
    assert len(read) < 10


def test_validation_images_of_their_own_are_the_same_for_every_seed(tmp_path):
    config = config_of(
        write_folder(tmp_path / "a", 3), val_path=str(write_folder(tmp_path / "b", 9)), val_images=3
    )
    names = [[Path(name).stem for name in held_out(open_images(config, 3, seed)).names] for seed in (0, 1)]
    assert names[0] == names[1] == ["0000", "0004", "0008"]


def test_validation_images_are_whole_up_to_their_largest_size(tmp_path):
    folder = write_folder(tmp_path / "set", 4, size=(50, 70))
    whole, cut = (
        held_out(open_images(config_of(folder, val_images=2, val_resolution=side), 3, 0)).images
        for side in (512, 60)
    )
    assert [image.shape for image in whole] == [(3, 50, 70)] * 2
    assert [image.shape for image in cut] == [(3, 50, 60)] * 2


def test_a_largest_size_of_validation_images_that_no_score_can_be_computed_on_is_refused(tmp_path):
    images = open_images(config_of(write_folder(tmp_path / "set", 4), val_images=2, val_resolution=10), 3, 0)
    with pytest.raises(ValueError, match=r"data\.val_resolution 10 leaves fewer than the 11 pixels"):
        held_out(images, 11)


def test_unreadable_validation_images_are_listed(tmp_path):
    folder = write_folder(tmp_path / "val", 3)
    (folder / "0001.png").write_bytes(b"")
    config = config_of(write_folder(tmp_path / "train", 3), val_path=str(folder), val_images=3)
    result = held_out(open_images(config, 3, 0))
    assert len(result.images) == 2
    assert len(result.rejects) == 1
    assert result.rejects[0].path.endswith("0001.png")
    for name in ("0000", "0002"):
        (folder / f"{name}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the validation images can be read.*0000\.png"):
        held_out(open_images(config, 3, 0))
