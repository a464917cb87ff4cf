"""Encoding: the latents are the codec's, bad pictures are listed, and a store is the same however it came about."""

import errno
import json
import os
import resource
import signal
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from image_sets import write_bad_files, write_tar
from PIL import Image
from stores import SMALL, KilledAt, at_once, digest, in_process, tiny_codec, write_pictures

from latentcodec.pixels import decode, load_image
from latentcodec.store import LatentStore, StoreError, encode, finish, prepare, verify
from latentcodec.store.format import Settings
from latentcodec.store.items import Columns
from latentcodec.store.picture import bucket
from latentcodec.store.ranks import rank_and_world


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


pytestmark = pytest.mark.filterwarnings("default")  # of damaged EXIF data in the bad pictures


def make(sources, out, codec, **options):
    prepare([str(s) for s in sources], out, codec, **{**SMALL, **options})
    return encode(out, codec, workers=0)


# --- what is stored


def test_latents_are_those_of_the_codec(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 5, sizes=((32, 32), (30, 41)), captions=True)
    make([photos], tmp_path / "store", codec, dtype="float32")
    store = LatentStore(tmp_path / "store", codec)
    assert len(store) == 5
    assert sorted(item.id for item in store) == [f"{n:03}.png" for n in range(5)]
    for item in store:
        x = load_image(photos / item.id)
        assert torch.allclose(item.latent, codec.encode(x)[0], atol=1e-6)
        assert item.size == item.original_size == tuple(x.shape[-2:])
        assert item.caption == f"picture {int(item.id[:3])}"
        assert item.source == str(photos)
        assert codec.decode(item.latent[None], size=item.size).shape == x.shape


def test_mean_std_and_mirrored_latents(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 3, sizes=((30, 41),))
    make([photos], tmp_path / "store", codec, dtype="float32", posterior="mean and std", mirrored=True)
    for item in LatentStore(tmp_path / "store"):
        x = load_image(photos / item.id)
        padded = torch.nn.functional.pad(x, (0, 3, 0, 2), mode="replicate")
        posterior = codec.vae.encode(padded).latent_dist
        assert torch.allclose(item.std, (posterior.std / codec.latents_std)[0], atol=1e-6)
        assert torch.allclose(item.mirrored, codec.encode(x.flip(-1))[0], atol=1e-6)
        assert not torch.allclose(item.mirrored, item.latent.flip(-1), atol=1e-2)  # which is why it is stored
        assert item.mirrored_std.shape == item.std.shape


def test_size_scales_the_shorter_side_and_takes_the_centre(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 1, sizes=((64, 96),))
    make([photos], tmp_path / "store", codec, size=32)
    item = LatentStore(tmp_path / "store")[0]
    assert (item.size, item.original_size, item.crop) == ((32, 32), (64, 96), (0, 8))
    x = torch.nn.functional.interpolate(
        load_image(photos / "000.png"), (32, 48), mode="bicubic", antialias=True
    )
    assert torch.allclose(item.latent.float(), codec.encode(x[..., 8:40].clamp(-1, 1))[0], atol=2e-3)


@pytest.mark.parametrize(
    ("original", "expected"),
    [((512, 512), (512, 512)), ((300, 600), (384, 704)), ((600, 300), (704, 384)), ((10, 1000), (256, 1024))],
)
def test_buckets_keep_area_and_ratio(original, expected):
    assert bucket(original, 512 * 512, 64) == expected


def test_every_shard_holds_one_shape(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 9, sizes=((40, 40), (30, 60), (60, 30)))
    make([photos], tmp_path / "store", codec, area=1024, multiple=8, shard_size=2)
    store = LatentStore(tmp_path / "store")
    assert store.shapes == {(4, 8, 8): 3, (4, 6, 11): 3, (4, 11, 6): 3} or len(store.shapes) == 3
    assert [entry.items for entry in store.index.shards] == [2, 1] * 3
    assert verify(tmp_path / "store").ok


def test_a_shard_of_large_pictures_holds_fewer(tmp_path, codec, monkeypatch):
    photos, out = write_pictures(tmp_path / "photos", 9, sizes=((32, 32), (96, 96))), tmp_path / "store"
    monkeypatch.setattr("latentcodec.store.planning.SHARD_BYTES", 4 * 4 * 8 * 8 * 2 * 3)  # of 3 small ones
    plan = prepare([str(photos)], out, codec, **SMALL, posterior="mean and std", mirrored=True)
    assert [(plan.shape(n)[1], plan.rows(n)) for n in plan.shards] == [(8, 3), (8, 2)] + [(24, 1)] * 4


def test_sources_of_every_kind_hold_the_same_pictures(tmp_path, codec):
    datasets = pytest.importorskip("datasets")
    photos = write_pictures(tmp_path / "photos", 4, captions=True)
    names = sorted(path.name for path in photos.iterdir())
    write_tar(tmp_path / "set.tar", {name: (photos / name).read_bytes() for name in names})
    cells = [{"bytes": (photos / f"{n:03}.png").read_bytes(), "path": None} for n in range(4)]
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "kind": datasets.Value("int64")}
    )
    table = {"image": cells, "text": [f"picture {n}" for n in range(4)], "kind": list(range(4))}
    dataset = datasets.Dataset.from_dict(table, features=features)
    dataset.to_parquet(tmp_path / "set.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    columns = Columns(caption="text", label="kind")
    latents = {}
    for name, source, extra in (
        ("folder", photos, {}),
        ("glob", f"{photos}/*.png", {}),
        ("tar", tmp_path / "set.tar", {}),
        ("parquet", tmp_path / "set.parquet", {"columns": columns}),
        ("saved", tmp_path / "saved", {"columns": columns}),
    ):
        make([source], tmp_path / name, codec, **extra)
        store = LatentStore(tmp_path / name)
        assert [item.caption for item in store] == [f"picture {n}" for n in range(4)], name
        assert [item.label for item in store] == ([0, 1, 2, 3] if extra else [None] * 4), name
        latents[name] = store.batch(range(4))["latent"]
    assert all(torch.equal(latents["folder"], other) for other in latents.values())


def test_a_file_name_that_is_no_utf_8(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 1)
    os.rename(photos / "000.png", os.fsencode(photos) + b"/caf\xe9.png")
    make([photos], tmp_path / "store", codec)
    assert LatentStore(tmp_path / "store")[0].id == "caf\\udce9.png"


# --- what cannot be read


@pytest.mark.parametrize("settings", [{"size": 32}, {}])
def test_bad_pictures_are_listed_and_their_neighbours_are_not_lost(tmp_path, codec, settings):
    photos = write_pictures(tmp_path / "photos", 6)
    make([photos], tmp_path / "clean", codec, **settings)
    bad = write_bad_files(photos)
    (photos / "001.txt").write_bytes(b"\xff\xfe")  # a caption that is no text
    job = make([photos], tmp_path / "store", codec, **settings)
    listed = [json.loads(line) for line in (tmp_path / "store/rejects.jsonl").read_text().splitlines()]
    assert sorted(reject["path"] for reject in listed) == sorted([*map(str, bad), str(photos / "001.png")])
    assert all(reject["reason"].startswith(reject["path"]) for reject in listed)
    assert job.index.rejected == len(bad) + 1
    clean, store = LatentStore(tmp_path / "clean"), LatentStore(tmp_path / "store")
    expected = {item.id: item.latent for item in clean if item.id != "001.png"}
    assert {item.id for item in store} == set(expected)
    assert all(torch.equal(item.latent, expected[item.id]) for item in store)


def test_a_latent_that_is_not_finite_is_left_out(tmp_path, codec, monkeypatch):
    photos = write_pictures(tmp_path / "photos", 3)
    bad = load_image(photos / "001.png")

    def broken(self, x):
        mean = self.encode(x)
        mean[(x == bad).flatten(1).all(1)] = 1e6  # infinite in float16
        return mean, mean

    monkeypatch.setattr(type(codec), "posterior", broken)
    job = make([photos], tmp_path / "store", codec)
    assert [item.id for item in LatentStore(tmp_path / "store")] == ["000.png", "002.png"]
    assert job.index.rejected == 1


def test_too_small_and_too_elongated_pictures(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 2, sizes=((32, 32), (64, 64)))
    Image.new("RGB", (9000, 2)).save(photos / "line.png")
    job = make([photos], tmp_path / "store", codec, size=48, min_side=2)
    assert job.index.rejected == 1
    job = make([photos], tmp_path / "other", codec, size=48, min_side=48)
    assert job.index.rejected == 2


@pytest.mark.parametrize("place", ["gone", "empty"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_is_gone_is_no_folder_of_broken_pictures(tmp_path, codec, place, workers):
    """As a disk that is not mounted when an encoding goes on; its folder may stay, and be empty."""
    photos, out = write_pictures(tmp_path / "photos", 5), tmp_path / "store"
    make([photos], tmp_path / "peace", codec, size=32)
    prepare([str(photos)], out, codec, size=32, **SMALL)
    photos.rename(tmp_path / "away")
    if place == "empty":
        photos.mkdir()
    with pytest.raises(OSError, match=rf"the source {photos} is {place}.*the same command goes on") as raised:
        encode(out, codec, workers=workers)
    assert "Traceback" not in str(raised.value)
    assert not list(out.glob("shards/*/*.arrow"))
    if place == "empty":
        photos.rmdir()
    (tmp_path / "away").rename(photos)
    make([photos], out, codec, size=32)
    assert digest(out) == digest(tmp_path / "peace")


def test_a_tar_that_is_gone_stops_the_encoding(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 2)
    write_tar(tmp_path / "set.tar", {path.name: path.read_bytes() for path in photos.iterdir()})
    prepare([str(tmp_path / "set.tar")], tmp_path / "store", codec, **SMALL)
    (tmp_path / "set.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"the source .*set\.tar is gone"):
        encode(tmp_path / "store", codec, workers=0)


def test_one_file_that_is_gone_is_left_out(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 3)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    (photos / "001.png").unlink()
    assert encode(tmp_path / "store", codec, workers=0).index.rejected == 1


FAULTS = [OSError(number, os.strerror(number)) for number in (errno.EIO, errno.ESTALE, errno.EMFILE)]


@pytest.mark.parametrize("fault", [*FAULTS, MemoryError()], ids=str)
@pytest.mark.parametrize("size", [32, None])
def test_what_is_wrong_with_the_machine_is_not_blamed_on_a_picture(tmp_path, codec, monkeypatch, fault, size):
    """While headers are read for the plan (without a size for all), and while pictures are decoded."""
    photos, out = write_pictures(tmp_path / "photos", 3), tmp_path / "store"
    if size is not None:
        prepare([str(photos)], out, codec, size=size, **SMALL)

    def failing(source, name):
        raise fault

    monkeypatch.setattr(decode, "open_image", failing)
    with pytest.raises(OSError, match=r"photos/00\d\.png: .*the same command goes on"):
        make([photos], out, codec, size=size)
    monkeypatch.undo()
    assert make([photos], out, codec, size=size).index.items == 3


# --- the same store, however it came about


@pytest.fixture(scope="module")
def many(tmp_path_factory, codec):
    """A folder with some broken pictures, and the digest of the store that an undisturbed process makes of it."""
    folder = tmp_path_factory.mktemp("many")
    photos = write_pictures(folder / "photos", 14, sizes=((32, 32), (24, 40)), captions=True)
    write_bad_files(photos)
    make([photos], folder / "peace", codec)
    return photos, digest(folder / "peace")


def whole(photos, out, codec, rank=0, world=1, killed_at=None):
    if killed_at is not None:
        KilledAt(killed_at)
    prepare([str(photos)], out, codec, **SMALL)
    encode(out, codec, rank, world, workers=0)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_make_the_same_store(many, tmp_path, codec, world):
    photos, expected = many
    for rank in reversed(range(world)):
        assert in_process(whole, photos, tmp_path / "store", codec, rank, world) == 0
    assert digest(tmp_path / "store") == expected


def test_killed_before_every_file_operation_and_resumed_by_others(many, tmp_path, codec):
    photos, expected = many
    out = tmp_path / "store"
    for starts in range(100):  # rank 0 and 1 of 2 in turn, each killed one operation further on
        status = in_process(whole, photos, out, codec, starts % 2, 2, starts)
        assert status in (0, -signal.SIGKILL)
        if status == 0 and (out / "index.json").exists():
            break
    assert starts > 5
    whole(photos, out, codec)
    assert digest(out) == expected


def test_ranks_that_run_at_once(many, tmp_path, codec):
    photos, expected = many
    works = [partial(whole, photos, tmp_path / "store", codec, rank, 3) for rank in range(3)]
    assert at_once(works) == [0, 0, 0]
    assert digest(tmp_path / "store") == expected


def test_workers_change_nothing(many, tmp_path, codec):
    photos, expected = many
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    encode(tmp_path / "store", workers=2)
    assert digest(tmp_path / "store") == expected


def test_workers_need_no_file_and_no_shared_memory_for_each_picture(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 20)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL | dict(batch=20, shard_size=20))

    def work():
        signal.alarm(30)  # a batch that is lost is waited for
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 15,) * 2)
        encode(tmp_path / "store", codec, workers=1)

    assert in_process(work) == 0
    assert len(LatentStore(tmp_path / "store")) == 20


@pytest.mark.parametrize("error", [ValueError("rows: no such column"), PermissionError(13, "no", "rows")])
def test_an_error_in_a_worker_is_the_line_that_it_is_without_one(tmp_path, codec, monkeypatch, error):
    def refused(*arguments):
        raise error

    photos = write_pictures(tmp_path / "photos", 2)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    monkeypatch.setattr("latentcodec.store.decoding.decode", refused)
    for workers in (0, 1):
        with pytest.raises(type(error)) as raised:
            encode(tmp_path / "store", codec, workers=workers)
        assert str(raised.value) == str(error)


def test_ranks_of_launchers():
    assert rank_and_world({}) == (0, 1)
    assert rank_and_world({"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)
    srun = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    assert rank_and_world(srun) == (1, 2)
    assert rank_and_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == (0, 1)  # a script without srun
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert rank_and_world(array) == (2, 4)
    assert rank_and_world(array | srun) == (5, 8)
    steps = array | {"SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_ID": "11"}
    assert rank_and_world(steps) == (3, 4)
    for task in ("8", "13"):  # between two steps, and behind the last one
        with pytest.raises(ValueError, match=f"SLURM array task {task} has no place among 4 that start at 5"):
            rank_and_world(steps | {"SLURM_ARRAY_TASK_ID": task})
    for name, others in (("RANK", {"WORLD_SIZE": "2"}), ("SLURM_ARRAY_TASK_STEP", steps)):
        with pytest.raises(ValueError, match=f"^{name} in the environment is 'abc', not a number"):
            rank_and_world({**others, name: "abc"})
    for given, missing in (
        ("RANK", "WORLD_SIZE"),
        ("WORLD_SIZE", "RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ):
        with pytest.raises(ValueError, match=f"{given} is 2 and {missing} is not set"):
            rank_and_world({given: "2"})
        assert rank_and_world({given: "2"}, rank=1, world=3) == (1, 3)
    assert rank_and_world({"WORLD_SIZE": "1"}) == (0, 1)
    assert rank_and_world({"RANK": "1", "WORLD_SIZE": "4"}, rank=3) == (3, 4)


# --- more pictures, and fewer


def test_new_pictures_are_appended_as_new_shards(tmp_path, codec):
    photos, out = write_pictures(tmp_path / "photos", 5), tmp_path / "store"
    make([photos], out, codec)
    before = {path: path.read_bytes() for path in out.glob("shards/*/*.arrow")}
    make([photos], out, codec)  # nothing new
    assert len(LatentStore(out).index.shards) == 2
    write_pictures(photos, 3, first=5)
    make([photos], out, codec)
    store = LatentStore(out)
    assert [item.id for item in store] == [f"{n:03}.png" for n in range(8)]
    assert len(store.index.shards) == 3
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_dropped_picture_is_gone_and_stays_gone(tmp_path, codec):
    photos, out = write_pictures(tmp_path / "photos", 6), tmp_path / "store"
    make([photos], out, codec)
    kept = {item.id: item.latent for item in LatentStore(out)}
    finish(out, drop=["002.png"])
    assert verify(out).ok
    store = LatentStore(out, check=True)
    assert {item.id for item in store} == set(kept) - {"002.png"}
    assert all(torch.equal(item.latent, kept[item.id]) for item in store)
    make([photos], out, codec)
    assert len(LatentStore(out)) == 5
    with pytest.raises(StoreError, match=r"no picture 'missing.png'.*--drop"):
        finish(out, drop=["missing.png"])


def test_a_picture_that_two_sources_have_is_dropped_by_its_whole_name(tmp_path, codec):
    one, other = (write_pictures(tmp_path / name, 2) for name in ("one", "other"))
    make([one, other], tmp_path / "store", codec)
    before = digest(tmp_path / "store")
    with pytest.raises(StoreError, match=rf"'000.png' is in 2 sources; .*as {one}/000.png, {other}/000.png"):
        finish(tmp_path / "store", drop=["000.png"])
    assert digest(tmp_path / "store") == before
    finish(tmp_path / "store", drop=[f"{other}/000.png"])
    kept = [(item.source, item.id) for item in LatentStore(tmp_path / "store")]
    assert kept == [(str(one), "000.png"), (str(one), "001.png"), (str(other), "001.png")]


def test_a_picture_with_a_tab_in_its_name_is_dropped(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 3)
    (photos / "001.png").rename(photos / "a\tb.png")
    make([photos], tmp_path / "store", codec)
    assert finish(tmp_path / "store", drop=["a\tb.png"]).items == 2
    assert [item.id for item in LatentStore(tmp_path / "store", check=True)] == ["000.png", "002.png"]


# --- refusals


def test_other_settings_are_refused_by_name(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 2)
    make([photos], tmp_path / "store", codec, size=32)
    with pytest.raises(StoreError, match="begun with size 32, not 64"):
        make([photos], tmp_path / "store", codec, size=64)
    with pytest.raises(StoreError, match=r"begun with codec '[0-9a-f]{64}', not '[0-9a-f]{64}'"):
        make([photos], tmp_path / "store", tiny_codec(seed=1), size=32)


def test_other_sources_wait_for_an_unfinished_store(tmp_path, codec):
    photos, others = write_pictures(tmp_path / "photos", 5), write_pictures(tmp_path / "others", 2)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    with pytest.raises(StoreError, match=r"not finished.*photos"):
        prepare([str(others)], tmp_path / "store", codec, **SMALL)
    with pytest.raises(StoreError, match="2 of 2 shards are missing"):
        finish(tmp_path / "store")
    with pytest.raises(StoreError, match="not finished"):
        LatentStore(tmp_path / "store")


def test_settings_that_contradict(tmp_path, codec):
    for options, words in (
        ({"size": 32, "area": 1024}, "--size and --area"),
        ({"size": 2}, "--size 2: at least 4"),
        ({"area": 1024, "multiple": 6}, "multiple of 4"),
        ({"multiple": 8}, "--multiple belongs to --area"),
        ({"dtype": "float64"}, "--dtype float64"),
        ({"shard_size": 0}, "--shard-size 0"),
    ):
        with pytest.raises(ValueError, match=words):
            make([tmp_path], tmp_path / "store", codec, **options)
    with pytest.raises(ValueError, match="no such file or folder"):
        make([tmp_path / "nowhere"], tmp_path / "store", codec)


def test_two_encoders_on_one_store(tmp_path, codec):
    photos = write_pictures(tmp_path / "photos", 5)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)

    def second(done, rejected):
        def work():
            with pytest.raises(StoreError, match=r"another process is encoding .* \(rank 0 of 1\)"):
                encode(tmp_path / "store", codec, workers=0)

        statuses.append(in_process(work))

    statuses = []
    encode(tmp_path / "store", codec, workers=0, progress=second)
    assert set(statuses) == {0}
    assert verify(tmp_path / "store").ok


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, codec, capfd):
    photos = write_pictures(tmp_path / "photos", 9)
    make([photos], tmp_path / "peace", codec, dtype="float32")
    shard = next((tmp_path / "peace").glob("shards/*/*0.arrow"))

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        prepare([str(photos)], tmp_path / "store", codec, **SMALL, dtype="float32")
        resource.setrlimit(resource.RLIMIT_FSIZE, (shard.stat().st_size // 2,) * 2)
        encode(tmp_path / "store", codec, workers=0)

    assert in_process(work) == 1
    assert f"OSError: [Errno 27] File too large: '{tmp_path}/store/shards" in capfd.readouterr().out
    assert not list((tmp_path / "store").glob("shards/*/*.arrow"))
    make([photos], tmp_path / "store", codec, dtype="float32")
    assert digest(tmp_path / "store") == digest(tmp_path / "peace")


def test_a_plan_of_another_version_or_damaged(tmp_path, codec):
    photos, out = write_pictures(tmp_path / "photos", 5), tmp_path / "store"
    prepare([str(photos)], out, codec, **SMALL)
    path = out / "plan/0000.arrow"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"version": 1', b'"version": 7'))
    with pytest.raises(StoreError, match="plan of version 7"):
        encode(out, codec, workers=0)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError, match="damaged or cut short"):
        encode(out, codec, workers=0)
    path.write_bytes(content.replace(b"003.png", b"033.png"))
    with pytest.raises(StoreError, match="digest"):
        encode(out, codec, workers=0)


def test_the_page_of_the_format_names_every_setting():
    page = (Path(__file__).parents[2] / "docs/store.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| `settings` |"))
    assert row.split(":")[1].strip(" |").split(", ") == [field.name for field in fields(Settings)]


def test_settings_say_what_differs():
    one = Settings("a", 4, 8, size=512)
    other = Settings("a", 4, 8, size=256, dtype="int8")
    assert one.differences(other) == ["size 512, not 256", "dtype 'float16', not 'int8'"]
