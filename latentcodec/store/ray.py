"""A store encoded on a Ray cluster (pip install 'latentcodec[ray]'): Ray chooses who does which shard, and no more.

    import ray
    plan = prepare(["photos"], "latents", "photo-f8c16", size=512)
    encode_with_ray("latents")                    # all that follows; or, inside a pipeline of your own:
    ray.data.from_items([{"shard": s} for s in plan.shards]).map_batches(
        EncodeShards, fn_constructor_args=("latents",), batch_size=1, num_gpus=1, concurrency=8)

The machine that plans needs no GPU (`prepare(..., device="cuda", elsewhere=True)`). The store must lie where all nodes
see it. A worker or a driver that dies costs the shards it was at: start again, with Ray or without. A worker takes no
CPU slot (num_cpus=0): with one, Ray waits in silence on machines that have no more slots than workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latentcodec.extras import require
from latentcodec.store.encoding import ShardEncoder
from latentcodec.store.finishing import finish
from latentcodec.store.format import StoreError
from latentcodec.store.job import Job, missing_shards

TRIES = 3  # of one shard, when its worker dies


class EncodeShards:
    """`ShardEncoder` for `ray.data.Dataset.map_batches`: {"shard": [...]} -> one receipt for each."""

    def __init__(
        self, store: str, codec: str | None = None, device: str | None = None, workers: int = 0
    ) -> None:
        self.encoder = ShardEncoder(store, codec, device, workers)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encodes the shards of a batch."""
        receipts = [self.encoder(int(shard)) for shard in batch["shard"]]
        names = ("shard", "written", "rows", "rejected")
        return {name: np.array([getattr(receipt, name) for receipt in receipts]) for name in names}


def device_of_actors() -> str:
    """What actors encode on where nobody says it: GPUs where the cluster has some. Stays connected to it.

    Raises ModuleNotFoundError without Ray.
    """
    ray, _ = _connected()
    return "cuda" if ray.cluster_resources().get("GPU") else "cpu"


def encode_with_ray(
    store: str | Path,
    codec: str | None = None,
    actors: int | None = None,
    gpus_per_actor: float | None = None,
    device: str | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Job:
    """Encodes the missing shards of a planned store with Ray actors, then writes the index.

    `actors`: by default one for each GPU of the cluster, or one for each CPU where there is none or CPUs are to encode.
    `gpus_per_actor`: by default 1 where GPUs encode. `device`, `workers`: of each actor, as `ShardEncoder` has them. A
    shard whose actor dies is tried three times. Raises ModuleNotFoundError without Ray, and StoreError where an actor
    has no such device.
    """
    require("ray", "ray")
    plan = ShardEncoder(store, codec, device, workers).plan  # what no actor can do is refused here
    ray, started_here = _connected()
    try:
        todo = missing_shards(Path(store), plan)
        resources = ray.cluster_resources()
        devices = {device or plan.part(shard).machine["device"] for shard in todo}
        gpus = int(resources.get("GPU", 0)) if any(name.startswith("cuda") for name in devices) else 0
        share = gpus_per_actor if gpus_per_actor is not None else float(bool(gpus))
        count = min(len(todo), actors or gpus or int(resources.get("CPU", 1)))
        actor = ray.remote(num_cpus=0, num_gpus=share)(ShardEncoder)
        arguments = (str(Path(store).resolve()), codec, device, workers)
        receipts = _run(ray, lambda: actor.remote(*arguments), todo, count, progress)
    finally:
        if started_here:
            ray.shutdown()
    return Job(receipts, finish(store))


def _connected() -> tuple[Any, bool]:
    """Ray, and whether it was connected here, to the cluster that is there or to one that it starts."""
    require("ray", "ray")
    import ray

    if ray.is_initialized():
        return ray, False
    ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    return ray, True


def _run(
    ray: Any, start: Callable[[], Any], todo: list[int], count: int,
    progress: Callable[[int, int], None] | None,
) -> list[Any]:  # fmt: skip
    """A pool of `count` actors, each with one shard at a time; a dead one is replaced and its shard given out again."""
    idle = [start() for _ in range(count)]
    waiting, tries, receipts = list(todo), dict.fromkeys(todo, 0), []
    running: dict[Any, tuple[int, Any]] = {}
    while waiting or running:
        while waiting and idle:
            shard, worker = waiting.pop(0), idle.pop()
            tries[shard] += 1
            running[worker.__call__.remote(shard)] = shard, worker
        done, _ = ray.wait(list(running), num_returns=1)
        shard, worker = running.pop(done[0])
        try:
            receipt = ray.get(done[0])
        except ray.exceptions.RayActorError:
            if tries[shard] == TRIES:
                raise
            waiting.insert(0, shard)
            idle.append(start())
            continue
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StoreError):  # a sentence, which Ray tells with all of its traceback
                raise StoreError(f"an actor of Ray: {error.cause}") from None
            raise
        idle.append(worker)
        receipts.append(receipt)
        if progress is not None:
            progress(receipt.rows, receipt.rejected)
    return receipts
