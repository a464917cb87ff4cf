"""Streamed sets: what is exact about them, and that bad images do not stop them."""

import pytest
import torch
from image_sets import config_of, numbers_in, plain, read, table, write_set, write_shards

from latentcodec.sources.encoded import SourceFailed
from latentcodec.training.data import crops, stream
from latentcodec.training.data.images import held_out, open_images
from latentcodec.training.data.stream import training_batches

# The tests ask for more workers than a small machine has cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_shows_every_image_once_an_epoch_whatever_ranks_and_workers(tmp_path, workers):
    path = write_shards(tmp_path / "shards", 24, 4)
    config = config_of(path, streaming=True, workers=workers, shuffle_buffer=5)
    ranks = [read(config, steps=6, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    seen = [number for batches in ranks for batch in batches for number in numbers_in(batch)]
    assert sorted(seen) == list(range(24))
    assert seen != sorted(seen)


def test_every_epoch_of_a_stream_has_its_own_order(tmp_path):
    config = config_of(write_shards(tmp_path / "shards", 24, 4), streaming=True, shuffle_buffer=5)
    seen = [number for batch in read(config, steps=12) for number in numbers_in(batch)]
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_exactly_with_the_same_ranks_and_workers(tmp_path, workers):
    path = write_shards(tmp_path / "shards", 22, 4, bad=(3, 8, 9))
    config = config_of(path, streaming=True, workers=workers, shuffle_buffer=5, val_images=2)
    layout = {"accumulation": 3, "rank": 1, "world_size": 2, "batch_size": 2}
    whole = read(config, steps=6, **layout)
    for start in (1, 4):
        rest = read(config, steps=6 - start, start_step=start, **layout)
        for one, other in zip(rest, whole[3 * start :], strict=True):
            assert torch.equal(one["pixels"], other["pixels"])
            assert torch.equal(one["position"], other["position"])
    names = {reject.path for batch in whole for reject in batch["rejects"]}
    assert names <= {f"{path} [train] image {number}.png" for number in (3, 8, 9)}


@pytest.mark.parametrize(("workers", "start", "untimed"), [(0, 3, 1), (2, 3, 2), (0, 0, 0)])
def test_a_resumed_stream_may_take_its_time_until_every_worker_is_where_it_goes_on(
    tmp_path, monkeypatch, workers, start, untimed
):
    """They read all that was seen before; a run far along was taken for one that stands still, every time."""
    waits = []
    monkeypatch.setattr(stream, "doing", lambda _, timed=True: waits.append(timed))
    config = config_of(write_shards(tmp_path / "set", 24, 4), streaming=True, workers=workers)
    assert len(read(config, steps=5, batch_size=2, start_step=start)) == 5
    assert waits == [False] * untimed + [True] * (6 - untimed)


def test_bad_images_of_a_stream_are_listed_and_stop_nothing(tmp_path):
    path = write_shards(tmp_path / "shards", 20, 2, bad=(3, 8))
    batches = read(config_of(path, streaming=True), steps=10, batch_size=4)
    names = {reject.path for batch in batches for reject in batch["rejects"]}
    assert names == {f"{path} [train] image {number}.png" for number in (3, 8)}
    assert {number for batch in batches for number in numbers_in(batch)} == set(range(20)) - {3, 8}


def test_held_out_images_of_a_stream_are_dropped_with_all_their_copies(tmp_path):
    (tmp_path / "set").mkdir()
    numbers = [*range(10), 0, 1]
    cells = [{"bytes": plain(number), "path": None} for number in numbers]
    table(numbers, cells).to_parquet(tmp_path / "set/train.parquet")
    images = open_images(config_of(tmp_path / "set", streaming=True, val_images=3), 3, 0)
    assert numbers_in({"pixels": torch.stack(held_out(images).images)}) == [0, 1, 2]
    seen = {number for batch in training_batches(images, 4, steps=5) for number in numbers_in(batch)}
    assert seen == set(range(3, 10))


def test_tar_shards_can_be_streamed(tmp_path):
    path = write_set(tmp_path, "tar", range(12))
    batches = read(config_of(path, streaming=True, image_column="png"), steps=3)
    assert sorted(number for batch in batches for number in numbers_in(batch)) == list(range(12))


@pytest.mark.parametrize("workers", [0, 2])
def test_hopeless_streams_end_with_a_clear_error(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(crops, "PATIENCE_IMAGES", 7)
    # How long torch waits for each worker that is still looking for an image when another one has given up.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    path = write_shards(tmp_path / "bad", 8, 2, bad=tuple(range(8)))
    with pytest.raises(ValueError, match=r"^7 images in a row cannot be read"):
        read(config_of(path, streaming=True, workers=workers), steps=1)
    path = write_shards(tmp_path / "few", 4, 2)
    with pytest.raises(ValueError, match=r"nothing is left to train on.*data.val_images"):
        read(config_of(path, streaming=True, workers=workers, val_images=4), steps=1)
    with pytest.raises(ValueError, match=r"no column 'photo'.*picture"):
        read(config_of(path, streaming=True, image_column="photo"), steps=1)
    saved = write_set(tmp_path, "saved", range(3))
    with pytest.raises(ValueError, match=r"saved.*leave out data.streaming"):
        read(config_of(saved, streaming=True, workers=workers), steps=1)
    (path / "train-00001-of-00002.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(SourceFailed, match=r"few.*reading the stream failed.*magic bytes"):
        read(config_of(path, streaming=True, workers=workers, val_images=0), steps=9)
