"""Labels stay beside their images all the way; padding and fewer images do what they say."""

from dataclasses import replace

import datasets
import pytest
import torch
from image_sets import config_of, numbers_in, plain, read, write_folder, write_set

from latentcodec.sources.images import Place, open_source
from latentcodec.training.data.config import DataConfig
from latentcodec.training.data.images import held_out, open_images
from latentcodec.training.data.stream import first_crops, training_batches


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_of_a_column_go_with_their_images(tmp_path, workers):
    cells = [{"bytes": plain(number), "path": None} for number in range(12)]
    cells[4] = {"bytes": b"broken", "path": None}  # its place is taken by an image of another class
    path = write_set(tmp_path, "parquet", range(12), cells)
    batches = read(config_of(path, label_column="label", workers=workers), steps=4)
    for batch in batches:
        assert batch["labels"].tolist() == numbers_in(batch)
    assert all("labels" not in batch for batch in read(config_of(path), steps=1))
    opened = open_images(config_of(path, label_column="label", val_images=3), 3, 0)
    held = held_out(opened)
    assert held.classes == [str(number) for number in numbers_in({"pixels": torch.stack(held.images)})]


def test_classes_and_words_have_names(tmp_path):
    cells = [{"bytes": plain(number), "path": None} for number in range(3)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "a": datasets.ClassLabel(names=["cat", "dog"]),
            "b": datasets.Value("string"),
        }
    )
    columns = {"image": cells, "a": [1, 0, 1], "b": ["red", "blue", None]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "x.parquet")
    place = Place(str(tmp_path / "x.parquet"))
    labels = open_source(place, label_column="a").labels
    assert [labels.name(index) for index in range(3)] == ["dog", "cat", "dog"]
    labels = open_source(place, label_column="b").labels
    assert [labels.name(index) for index in range(3)] == ["red", "blue", "?"]
    for column, said in (("c", "no column 'c'"), ("image", "is no label")):
        with pytest.raises(ValueError, match=rf"{said}|data\.label_column"):
            open_source(place, label_column=column)


def test_a_folder_has_no_columns(tmp_path):
    with pytest.raises(ValueError, match=r"data\.label_column 'label': there are no columns"):
        open_source(Place(str(write_folder(tmp_path / "x", 2))), label_column="label")


@pytest.mark.parametrize("key", ["label_column", "train_images"])
def test_a_stream_has_neither_labels_nor_a_number_of_images(key):
    with pytest.raises(ValueError, match=f"data.{key} needs"):
        DataConfig(path="x", streaming=True, **{key: 1 if key == "train_images" else "x"})


def digits(**settings):
    defaults = {"drawn": "digits", "padding": 2, "resolution": 32, "min_scale": 1.0, "flip": False}
    return DataConfig(**{**defaults, "workers": 0, "val_images": 4, "val_resolution": 32, **settings})


@pytest.mark.slow
def test_padding_repeats_the_edge_around_images_of_both_sets():
    images = open_images(digits(), 1, 0)
    (batch,) = training_batches(images, 5, steps=1)
    assert batch["pixels"].shape == (5, 1, 32, 32)
    index = images.train.tolist()
    found = [torch.equal(batch["pixels"][0, :, 2:-2, 2:-2], images.source.read(i)) for i in index[:2000]]
    middles = batch["pixels"][..., 2:-2, 2:-2]
    assert any(found) or any(torch.equal(middles[0], images.source.read(i)) for i in index[2000:])
    assert torch.equal(batch["pixels"][..., 0, :], batch["pixels"][..., 2, :])
    held = held_out(images)
    assert [image.shape for image in held.images] == [(1, 32, 32)] * 4
    assert held.classes == [images.source.labels.name(i) for i in images.val]


def test_fewer_training_images_are_some_of_those_that_are_not_held_out():
    whole, few = (open_images(digits(train_images=count), 1, 0) for count in (None, 50))
    assert len(few.train) == 50
    assert {*few.train} < {*whole.train}
    assert few.val.tolist() == whole.val.tolist()
    assert {*open_images(digits(train_images=50), 1, 1).train} != {*few.train}


def test_the_start_is_given_a_thousand_cells_however_small_the_crops_are(tmp_path):
    images = open_images(digits(), 1, 0)
    assert len(first_crops(images, 32)) == 1024
    assert len(first_crops(images, 8)) == 64
    folder = write_folder(tmp_path / "x", 3)
    large = open_images(replace(config_of(folder), resolution=16), 3, 0)
    assert len(first_crops(large, 4)) == 64
