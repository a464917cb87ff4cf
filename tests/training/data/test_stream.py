"""The training stream is a function of seed and position: the same for all workers, ranks and restarts."""

import pickle

import numpy as np
import pytest
import torch
from image_sets import (
    assert_same_stream,
    config_of,
    numbers_in,
    plain,
    read,
    write_folder,
    write_photos,
    write_set,
)

from latentcodec.sources.encoded import EncodedSource
from latentcodec.training.data.config import DataConfig
from latentcodec.training.data.crops import Cropping, CropStream
from latentcodec.training.data.images import held_out, open_images
from latentcodec.training.data.order import EpochOrder
from latentcodec.training.data.stream import training_batches

# The tests ask for more workers than a small machine has cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_stream_is_bit_identical_for_any_number_of_workers(tmp_path, workers):
    folder = write_photos(tmp_path / "photos", 11)
    (folder / "5.jpg").write_bytes(b"no image")
    for path, steps in ((folder, 9), (None, 3)):
        alone = read(config_of(path), steps=steps)
        assert_same_stream(read(config_of(path, workers=workers), steps=steps), alone)


def test_stream_started_in_the_middle_equals_the_rest(tmp_path):
    folder = write_photos(tmp_path / "photos", 11)
    whole = read(config_of(folder), steps=9, accumulation=3)
    for start in (1, 4, 8):  # 4 * 12 positions lie in the middle of the fifth epoch
        for workers in (0, 2):
            rest = read(config_of(folder, workers=workers), steps=9 - start, accumulation=3, start_step=start)
            assert_same_stream(rest, whole[3 * start :])


@pytest.mark.parametrize("buckets", [False, True])
def test_two_ranks_together_see_what_one_rank_sees(tmp_path, buckets):
    folder = write_photos(tmp_path / "photos", 11)
    config = config_of(folder, buckets=buckets, resolution=32)
    one = read(config, steps=5, batch_size=6, accumulation=2)
    ranks = [read(config, steps=5, batch_size=3, accumulation=2, rank=r, world_size=2) for r in (0, 1)]
    for batch, *parts in zip(one, *ranks, strict=True):
        assert torch.equal(batch["pixels"], torch.cat([part["pixels"] for part in parts]))
        assert torch.equal(batch["position"], torch.cat([part["position"] for part in parts]))


def test_accumulation_only_cuts_the_stream_into_smaller_pieces(tmp_path):
    folder = write_photos(tmp_path / "photos", 11)
    whole = read(config_of(folder), steps=4, batch_size=6)
    pieces = read(config_of(folder), steps=4, batch_size=2, accumulation=3)
    pixels = [torch.cat([batch["pixels"] for batch in batches]) for batches in (whole, pieces)]
    assert torch.equal(*pixels)


def test_seed_changes_order_and_crops(tmp_path):
    folder = write_photos(tmp_path / "photos", 11)
    first, second = (read(config_of(folder), steps=2, seed=seed) for seed in (0, 1))
    assert not torch.equal(first[0]["pixels"], second[0]["pixels"])


def test_an_image_is_cropped_anew_every_time(tmp_path):
    batches = read(config_of(write_photos(tmp_path / "photos", 1)), steps=3)
    crops = torch.cat([batch["pixels"] for batch in batches])
    assert len(crops.unique(dim=0)) == 12


def test_batches_are_what_the_trainer_expects(tmp_path):
    batch = read(config_of(write_photos(tmp_path / "photos", 5)), steps=1)[0]
    assert batch["pixels"].shape == (4, 3, 16, 16)
    assert batch["pixels"].dtype == torch.float32
    assert batch["pixels"].is_contiguous()
    assert -1 <= batch["pixels"].min() < batch["pixels"].max() <= 1
    assert batch["position"].dtype == torch.int64
    assert batch["position"].tolist() == [0, 1, 2, 3]
    assert batch["rejects"] == []


def test_every_image_is_seen_exactly_once_an_epoch_in_ever_new_order(tmp_path):
    folder = write_folder(tmp_path / "set", 30)
    seen = [
        number
        for batch in read(config_of(folder, workers=2), steps=15, batch_size=4)
        for number in numbers_in(batch)
    ]
    epochs = [seen[0:30], seen[30:60]]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(tmp_path, workers):
    folder = write_photos(tmp_path / "photos", 5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    read(config_of(folder, workers=workers), steps=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_stream_survives_pickling_as_spawned_workers_need_it(tmp_path, kind):
    images = open_images(config_of(write_set(tmp_path, kind, range(9)), val_images=2), 3, 0)
    stream = CropStream(images.source, EpochOrder(images.train, 16, 0), Cropping(0, 0.5, True))
    expected = stream[[3, 4]]  # also fills whatever is filled on first use
    held_out(images)
    assert torch.equal(pickle.loads(pickle.dumps(stream))[[3, 4]]["pixels"], expected["pixels"])


def test_bucketed_batches_have_one_shape_a_step_and_fit_their_images(tmp_path):
    for name, size in {"wide": (60, 100), "tall": (100, 60), "square": (80, 80)}.items():
        for number in range(6):
            file = tmp_path / f"{name}{number}.png"
            file.write_bytes(plain({"wide": 1, "tall": 2, "square": 3}[name], size))
    (tmp_path / "bad.png").write_bytes(b"")
    images = open_images(config_of(tmp_path, buckets=True, resolution=128, workers=2), 3, 0)
    batches = list(training_batches(images, 2, accumulation=2, steps=12))
    shapes = {1: (96, 160), 2: (160, 96), 3: (128, 128)}
    for step in range(12):
        pair = batches[2 * step : 2 * step + 2]
        assert pair[0]["pixels"].shape == pair[1]["pixels"].shape
        for batch in pair:
            if not batch["rejects"]:
                assert {shapes[number] for number in numbers_in(batch)} == {tuple(batch["pixels"].shape[-2:])}
    assert len({batch["pixels"].shape for batch in batches}) == 3


def test_the_headers_for_buckets_are_read_once(tmp_path, monkeypatch):
    read, size = [], EncodedSource.size
    monkeypatch.setattr(EncodedSource, "size", lambda self, i: read.append(i) or size(self, i))
    images = open_images(config_of(write_folder(tmp_path / "set", 5), buckets=True, resolution=32), 3, 0)
    for drawn in (True, False):
        list(training_batches(images, 2, steps=1, drawn=drawn))
    assert read == list(range(5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"streaming": True}, "data.streaming needs a data.path"),
        ({"streaming": True, "path": "x", "buckets": True}, "data.buckets"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_photographs_stream_without_a_complaint(photos):
    images = open_images(DataConfig(path=str(photos / "train"), workers=2, val_images=4), 3, 0)
    batches = list(training_batches(images, 16, steps=4))
    assert [batch["rejects"] for batch in batches] == [[]] * 4
    assert torch.stack([batch["pixels"] for batch in batches]).std() > 0.2
    assert len(held_out(images).images) == 4
