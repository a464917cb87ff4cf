"""A store encoded by Ray on two CPUs, one worker killed: the same bytes as without Ray."""

import os
import signal
import sys
import threading
import time
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
from stores import SMALL, digest, tiny_codec, write_pictures

from latentcodec.cli import run
from latentcodec.store import ShardEncoder, encode, prepare, verify
from latentcodec.store.plan import Plan


class RayHere:
    """What `encode_with_ray` asks of Ray, done at once and in this process."""

    class TaskError(Exception):
        """What Ray raises for an error of an actor: it holds the error, and says all of its traceback."""

        def __init__(self, cause):
            super().__init__(f"Traceback of {cause}\nin another process")
            self.cause = cause

    exceptions = SimpleNamespace(RayActorError=ChildProcessError, RayTaskError=TaskError)
    is_initialized = staticmethod(lambda: True)
    cluster_resources = staticmethod(lambda: {"CPU": 2.0})
    wait = staticmethod(lambda running, num_returns: (running[:1], running[1:]))

    @staticmethod
    def get(call):
        try:
            return call()
        except ValueError as error:
            raise RayHere.TaskError(error) from error

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


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A command line for a cluster of two GPUs that is started from a machine without one, and what actors reserve."""
    reserved = []

    def remote(**options):
        reserved.append(options["num_gpus"])
        return RayHere.remote(**options)

    two = SimpleNamespace(**{name: getattr(RayHere, name) for name in vars(RayHere) if name[0] != "_"})
    two.cluster_resources, two.remote = lambda: {"CPU": 8.0, "GPU": 2.0}, remote
    monkeypatch.setitem(sys.modules, "ray", two)
    monkeypatch.setattr("latentcodec.store.ray.require", lambda *packages: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("LATENTCODEC_DTYPE", raising=False)
    tiny_codec().save_pretrained(tmp_path / "codec")
    photos = write_pictures(tmp_path / "photos", 3)
    command = (
        "encode",
        photos,
        "--codec",
        tmp_path / "codec",
        "--out",
        tmp_path / "store",
        "--engine",
        "ray",
    )
    return [str(argument) for argument in command], reserved


@pytest.mark.parametrize("device", [(), ("--device", "cuda"), ("--device", "cuda:0")])
def test_the_gpus_of_the_cluster_are_planned_for_where_the_planning_machine_has_none(
    tmp_path, cluster, capsys, device
):
    """Here no actor has one, which is said in one line, and the store is gone on with on another device."""
    command, reserved = cluster
    assert run([*command, *device]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: an actor of Ray: ")
    assert "PyTorch finds no GPUs here" in said
    assert reserved == [1.0]
    machine = Plan.load(tmp_path / "store").parts[0].machine
    named = {name: machine[name] for name in ("device", "precision", "functions", "batch_pixels")}
    assert named == {
        "device": "cuda",
        "precision": "bfloat16",
        "functions": "Triton's",
        "batch_pixels": 1 << 23,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the machine that starts Ray is not the one that encodes
        assert run([*command, "--device", "cpu"]) == 0
    assert reserved == [1.0, 0.0]
    assert verify(tmp_path / "store").items == 3


def test_a_store_that_was_begun_on_cpus_is_gone_on_with_there_and_reserves_no_gpu(tmp_path, cluster):
    command, reserved = cluster
    prepare([str(tmp_path / "photos")], tmp_path / "store", str(tmp_path / "codec"), threads=1)
    assert run(command) == 0
    assert reserved == [0.0]
    assert verify(tmp_path / "store").items == 3


def test_without_ray_and_in_a_dry_run_the_device_must_be_here(tmp_path, cluster, capsys):
    command, reserved = cluster
    for arguments in ([*command[:-2], "--device", "cuda"], [*command, "--device", "cuda", "--dry-run"]):
        assert run(arguments) == 2
        assert "device cuda: PyTorch finds no GPUs here" in capsys.readouterr().err
    assert run([*command, "--dry-run"]) == 0
    assert run([*command, "--device", "gpu"]) == 2
    assert not reserved
    assert not (tmp_path / "store").exists()


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
