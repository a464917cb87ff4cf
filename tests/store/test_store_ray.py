"""A store encoded by Ray on two CPUs, one worker killed: the same bytes as without Ray."""

import os
import signal
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
from stores import SMALL, digest, tiny_codec, write_pictures

from latentcodec.cli import run
from latentcodec.store import ShardEncoder, encode, prepare, verify


class RayHere:
    """What `encode_with_ray` asks of Ray, done at once and in this process."""

    exceptions = SimpleNamespace(RayActorError=ChildProcessError)
    is_initialized = staticmethod(lambda: True)
    cluster_resources = staticmethod(lambda: {"CPU": 2.0})
    wait = staticmethod(lambda running, num_returns: (running[:1], running[1:]))
    get = staticmethod(lambda call: call())

    @staticmethod
    def remote(**options):
        def actor(encoder):
            return SimpleNamespace(__call__=SimpleNamespace(remote=lambda shard: partial(encoder, shard)))

        return lambda kind: SimpleNamespace(remote=lambda *arguments: actor(kind(*arguments)))


def test_the_actors_get_device_and_workers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", RayHere)
    monkeypatch.setattr("latentcodec.store.ray.require", lambda *packages: None)
    tiny_codec().save_pretrained(tmp_path / "codec")
    photos, made = write_pictures(tmp_path / "photos", 6), []

    class Watched(ShardEncoder):
        def __init__(self, *arguments):
            made.append(arguments[2:])
            super().__init__(*arguments)

    monkeypatch.setattr("latentcodec.store.ray.ShardEncoder", Watched)
    arguments = (
        "encode",
        photos,
        "--codec",
        tmp_path / "codec",
        "--out",
        tmp_path / "store",
        "--shard-size",
        2,
    )
    others = ("--engine", "ray", "--threads", 1, "--device", "cpu", "--workers", 0)
    assert run([str(argument) for argument in (*arguments, *others)]) == 0
    assert verify(tmp_path / "store").items == 6
    assert made == [("cpu", 0)] * 3  # one that reads the plan, and two actors
    assert run([str(argument) for argument in (*arguments, *others[:-1], -1)]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_ray_with_a_killed_worker_makes_the_same_store(tmp_path):
    import psutil

    ray = pytest.importorskip("ray")
    from latentcodec.store.ray import EncodeShards, encode_with_ray

    photos, codec = write_pictures(tmp_path / "photos", 40), tiny_codec()
    prepare([str(photos)], tmp_path / "peace", codec, **SMALL)
    encode(tmp_path / "peace", codec, workers=0)
    prepare([str(photos)], tmp_path / "store", codec, **SMALL)
    killed = []

    def kill_a_worker():
        while not killed:
            for process in psutil.Process().children(recursive=True):
                if "ShardEncoder" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
            time.sleep(0.05)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        killer = threading.Thread(target=kill_a_worker, daemon=True)
        killer.start()
        job = encode_with_ray(tmp_path / "store", actors=2)
        killer.join(60)
        assert killed
        assert job.index is not None
        assert digest(tmp_path / "store") == digest(tmp_path / "peace")
        prepare([str(photos)], tmp_path / "data", codec, **SMALL)
        rows = ray.data.from_items([{"shard": shard} for shard in range(10)]).map_batches(
            EncodeShards,
            fn_constructor_args=(str(tmp_path / "data"),),
            batch_size=1,
            concurrency=1,
            num_cpus=0,
        )
        assert sum(row["rows"] for row in rows.take_all()) == 40
    finally:
        ray.shutdown()
    encode(tmp_path / "data", codec, workers=0)
    assert digest(tmp_path / "data") == digest(tmp_path / "peace")
    assert verify(tmp_path / "data").ok
