"""What an encoding refuses: other settings, settings that contradict, a damaged plan; and a full disk."""

import resource
import signal
from dataclasses import fields
from pathlib import Path

import pytest
from stores import SMALL, digest, in_process, make, tiny_codec, write_pictures

from latentcodec.store import LatentStore, StoreError, encode, finish, prepare
from latentcodec.store.format import Settings


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
