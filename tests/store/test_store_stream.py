"""The stream for training: epochs, ranks, workers and buckets, and states that go on where a training stopped."""

import json
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from stores import SMALL, write_pictures
from stores import make_and_open as make
from torch.utils.data import DataLoader

from latentcodec.store import LatentStore, encode, prepare


def ids(stream, **loader):
    return [batch["id"] for batch in DataLoader(stream, batch_size=None, **loader)]


def test_an_epoch_is_every_picture_once_in_another_order(store):
    stream = store.dataset(2)
    first, again = ids(stream), ids(stream)
    assert first == again
    assert len(stream) == len(first) == 5
    assert len({name for batch in first for name in batch}) == 10  # 11 pictures, the last batch is not full
    stream.set_epoch(1)
    assert ids(stream) != first
    assert [n for b in ids(store.dataset(3, shuffle=False, drop_last=False)) for n in b] == [
        i.id for i in store
    ]


def test_ranks_and_workers_see_what_one_process_sees(store):
    whole = ids(store.dataset(4))
    halves = [ids(store.dataset(2, rank=rank, world=2), num_workers=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_draws_and_mirrors_do_not_depend_on_the_ranks(drawn):
    whole = next(iter(drawn.dataset(4)))
    halves = [next(iter(drawn.dataset(2, rank=rank, world=2))) for rank in (0, 1)]
    assert torch.equal(whole["latent"], torch.cat([half["latent"] for half in halves]))
    for k, index in enumerate(whole["index"].tolist()):
        item = drawn[index]
        flipped = bool(whole["is_mirrored"][k])
        mean, std = (item.mirrored, item.mirrored_std) if flipped else (item.latent, item.std)
        noise = (whole["latent"][k] - mean.float()) / std.float()
        assert abs(noise.mean().item()) < 0.3
        assert noise.std().item() == pytest.approx(1, abs=0.2)
    later = drawn.dataset(4)
    later.set_epoch(1)
    draws = {n: z for b in (whole, *later) for n, z in zip(b["index"].tolist(), b["latent"], strict=True)}
    assert not torch.equal(draws[int(whole["index"][0])], whole["latent"][0])


def test_resume_goes_on_with_the_next_batch_on_any_number_of_ranks(store):
    stream = store.dataset(4, seed=5)
    stream.set_epoch(3)
    batches = list(stream)
    state = json.loads(json.dumps(stream.state_after(batches[0])))
    resumed = [store.dataset(2, seed=5, rank=rank, world=2) for rank in (0, 1)]
    for half in resumed:
        half.load_state_dict(state)
    assert [a["id"] + b["id"] for a, b in zip(*resumed, strict=True)] == [
        batch["id"] for batch in batches[1:]
    ]
    with pytest.raises(ValueError, match="global_batch 4, here 8"):
        store.dataset(4, seed=5, rank=0, world=2).load_state_dict(state)


def test_the_loop_over_epochs_goes_on_where_a_loaded_state_was(store):
    """The loop of docs/store.md, stopped within its second epoch."""

    def loop(stream):
        for epoch in range(stream.epoch, 3):
            stream.set_epoch(epoch)
            for batch in stream:
                yield batch["id"], stream.state_after(batch)

    whole = list(loop(store.dataset(2)))
    for stopped_at in (0, 6, len(whole) // 3 - 1):  # the last is the end of the first epoch
        later = store.dataset(2)
        later.load_state_dict(whole[stopped_at][1])
        assert [names for names, _ in loop(later)] == [names for names, _ in whole[stopped_at + 1 :]]


def test_workers_that_stay_follow_the_epochs_and_a_loaded_state(store):
    """The same loop with workers that live from epoch to epoch."""
    stream = store.dataset(2)
    state, whole = stream.state_after({"step": 1}), ids(stream)
    stream.set_epoch(1)
    whole = whole[2:], ids(stream)
    later = pickle.loads(pickle.dumps(store.dataset(2)))
    later.load_state_dict(state)
    loader = DataLoader(later, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        later.set_epoch(epoch)
        assert [batch["id"] for batch in loader] == whole[epoch]


def test_a_stream_that_is_sent_to_a_worker_follows_the_epochs(store):
    stream = store.dataset(2)
    there = pickle.loads(ForkingPickler.dumps(stream))  # as workers get it that are spawned
    stream.set_epoch(1)
    assert there.epoch == 1
    assert ids(there) == ids(stream)


def test_a_store_that_was_read_can_be_sent_to_a_worker(store):
    item = store[0]
    assert torch.equal(pickle.loads(pickle.dumps(store))[0].latent, item.latent)


def test_a_state_of_another_store_of_as_many_pictures_is_refused(store, tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", len(store), first=100)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    encode(tmp_path / "store", codec, workers=0)
    other = LatentStore(tmp_path / "store")
    assert (len(other), other.fingerprint) == (len(store), store.fingerprint)
    stream = store.dataset(2)
    state = stream.state_after({"step": 0})
    with pytest.raises(ValueError, match="another stream of batches: index"):
        other.dataset(2).load_state_dict(state)
    for name in ("index", "drop_last", "draw", "mirror"):
        del state[name]  # as earlier versions saved it
    stream.load_state_dict(state)


def test_a_state_of_other_batches_is_refused(drawn):
    state = drawn.dataset(2).state_after({"step": 0})
    for name in ("drop_last", "draw", "mirror"):
        with pytest.raises(ValueError, match=f"another stream of batches: {name} True, here False$"):
            drawn.dataset(2, **{name: False}).load_state_dict(state)


def test_each_task_of_an_array_of_trainings_sees_all_pictures(store, monkeypatch):
    for name, value in (("ID", 2), ("MIN", 0), ("STEP", 1), ("COUNT", 4)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert (store.dataset(2).rank, store.dataset(2).world) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (store.dataset(2).rank, store.dataset(2).world) == (1, 2)


def test_a_batch_that_nothing_fills_is_refused(store):
    with pytest.raises(ValueError, match="no 2000 pictures of one shape"):
        store.dataset(1000, rank=0, world=2)
    assert len(store.dataset(1000, drop_last=False)) == len(store.shapes)
    with pytest.raises(ValueError, match="batch_size 0: at least 1"):
        store.dataset(0)
    with pytest.raises(ValueError, match="rank 2 of 2: ranks are 0 to 1"):
        store.dataset(1, rank=2, world=2)


def test_batches_have_one_shape_in_a_store_of_buckets(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 9, sizes=((32, 32), (24, 40)))
    store = make(photos, tmp_path / "store", codec)
    shapes = [tuple(batch["latent"].shape) for batch in store.dataset(2)]
    assert sorted(shapes) == [(2, 4, 6, 10)] * 2 + [(2, 4, 8, 8)] * 2
    with pytest.raises(ValueError, match="one latent shape"):
        store.batch([0, 8])
    assert set(store.to_datasets()) == {"4x6x10", "4x8x8"}


def test_what_a_store_does_not_hold(store):
    with pytest.raises(ValueError, match=r"holds no std to draw with; encode with --std$"):
        store.dataset(2, draw=True)
    with pytest.raises(ValueError, match="no mirrored"):
        store.dataset(2, mirror=True)
