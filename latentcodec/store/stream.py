"""Batches of a store for training: shuffled by (seed, epoch), divided among ranks and workers, resumed exactly.

The order of an epoch is a list of global batches, each the batches of all ranks at one step. It depends on the store,
the seed, the epoch and the global batch size, and on nothing else: four ranks with batches of 16 see together what two
ranks with batches of 32 see. Everything drawn (noise, mirror) is a function of (seed, epoch, picture).

Shapes: B batch, c latent channels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from latentcodec.randomness import Purpose, keyed_normal
from latentcodec.store.format import MIRRORED, Index, Shape
from latentcodec.store.ranks import rank_and_world

LACKING = ("index", "drop_last", "draw", "mirror")  # what states of earlier versions do not say


class Store(Protocol):
    """What a stream needs of a LatentStore."""

    folder: Path
    index: Index

    @property
    def fingerprint(self) -> str:
        """Of the codec."""

    @property
    def shapes(self) -> dict[Shape, int]:
        """Pictures of each latent shape."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Some pictures of one shape, stacked."""


class LatentBatches(IterableDataset):
    """The batches of one epoch, as `LatentStore.batch` gives them, with `index` [B] and `step` added.

    Put it into a DataLoader with batch_size=None; `set_epoch` before each epoch.
    """

    def __init__(
        self,
        store: Store,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        draw: bool | None = None,
        mirror: bool | None = None,
        drop_last: bool = True,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        """`batch_size`: pictures of one rank's batch; all of one latent shape.

        `draw`: draws latents from mean and std, by default where the store holds std. `mirror`: takes the mirrored
        picture's latents half of the time, by default where the store holds them. `drop_last`: leaves
        out the pictures of each latent shape that are too few for one more batch of every rank. With False they make a
        smaller batch; this is for one rank only, since another could get none of them. `rank`, `world`: by default from
        the environment of torchrun or SLURM. Raises ValueError for what the store does not hold.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: at least 1")
        self.rank, self.world = rank_and_world(rank=rank, world=world, arrays=False)
        self.store, self.batch_size, self.shuffle, self.seed = store, batch_size, shuffle, seed
        self.drop_last = drop_last
        self._begin = torch.zeros(2, dtype=torch.int64).share_memory_()  # epoch, and the first batch of it
        settings = store.index.settings
        self.draw = settings.posterior != "mode" if draw is None else draw
        self.mirror = settings.mirrored if mirror is None else mirror
        if self.draw and settings.posterior == "mode":
            raise ValueError(f"{store.folder}: holds no std to draw with; encode with --std")
        if self.mirror and not settings.mirrored:
            raise ValueError(f"{store.folder}: holds no mirrored latents; encode with --mirrored")
        if len(store) and not len(self):
            raise ValueError(
                f"{store.folder}: no {self.global_batch} pictures of one shape, for a batch of each rank; take a "
                "smaller batch_size, or drop_last=False"
            )
        if not drop_last and self.world > 1:
            raise ValueError("drop_last=False is for one rank: other ranks would get fewer batches")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin.share_memory_()  # a copy's own

    @property
    def epoch(self) -> int:
        """The epoch whose batches come, as `set_epoch` and a loaded state set it."""
        return int(self._begin[0])

    @property
    def global_batch(self) -> int:
        """Pictures of one step, over all ranks."""
        return self.batch_size * self.world

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        size = self.global_batch
        return sum(n // size if self.drop_last else -(-n // size) for n in self.store.shapes.values())

    def set_epoch(self, epoch: int) -> None:
        """Begins another epoch at its first batch; the epoch of a loaded state goes on after that state's batch."""
        if epoch != self.epoch:
            self._go_to(epoch, 0)

    def state_after(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What to save so that training goes on with the batch after this one."""
        return {
            "store": self.store.fingerprint,
            "index": self.store.index.digest,
            "items": len(self.store),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "global_batch": self.global_batch,
            "drop_last": self.drop_last,
            "draw": self.draw,
            "mirror": self.mirror,
            "epoch": self.epoch,
            "step": batch["step"] + 1,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_after` was. Any number of ranks, as long as the global batch is the same.

        Raises ValueError naming what differs.
        """
        here = self.state_after({"step": -1})
        told = {name: here[name] for name in LACKING} | state
        differences = [
            f"{name} {told.get(name)!r}, here {value!r}"
            for name, value in here.items()
            if name not in ("epoch", "step") and told.get(name) != value
        ]
        if differences:
            raise ValueError(f"this state belongs to another stream of batches: {'; '.join(differences)}")
        self._go_to(state["epoch"], state["step"])

    def _go_to(self, epoch: int, first: int) -> None:
        """Sets epoch and first batch, for workers too that stay from epoch to epoch: they share this memory."""
        self._begin.copy_(torch.tensor([epoch, first]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, first = self._begin.tolist()  # once: while this epoch is read the next one may be set
        batches = self._batches(epoch)
        for step in range(first + number, len(batches), workers):
            mine = batches[step][self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            yield self._read(mine, epoch, step)

    def _batches(self, epoch: int) -> list[np.ndarray]:
        """The picture numbers of each global batch of an epoch."""
        random = np.random.default_rng([Purpose.ORDER, self.seed, epoch])
        size, batches = self.global_batch, []
        for pictures in _by_shape(self.store):
            order = random.permutation(pictures) if self.shuffle else pictures
            whole = len(order) // size * size
            batches += np.split(order[:whole], whole // size) if whole else []
            if not self.drop_last and whole < len(order):
                batches.append(order[whole:])
        return [batches[i] for i in random.permutation(len(batches))] if self.shuffle else batches

    def _read(self, pictures: np.ndarray, epoch: int, step: int) -> dict[str, Any]:
        batch = self.store.batch(pictures.tolist())
        batch["index"], batch["step"] = torch.from_numpy(pictures), step
        keys = (epoch * len(self.store) + pictures).tolist()  # one number for each picture of each epoch
        others = {name: batch.pop(other) for name, other in MIRRORED.items() if other in batch}
        if self.mirror:
            flips = torch.from_numpy(self._flips(epoch)[pictures])
            for name, other in others.items():
                batch[name] = torch.where(flips[:, None, None, None], other, batch[name])
            batch["is_mirrored"] = flips
        if self.draw:
            mean, std = batch["latent"].float(), batch.pop("std").float()
            batch["latent"] = mean + std * keyed_normal(
                self.seed, keys, tuple(mean.shape[1:]), Purpose.POSTERIOR
            )
        return batch

    def _flips(self, epoch: int) -> np.ndarray:
        """Which pictures are mirrored in an epoch, bool for each picture of the store."""
        random = np.random.default_rng([Purpose.AUGMENTATION, self.seed, epoch])
        return random.random(len(self.store)) < 0.5


def _by_shape(store: Store) -> list[np.ndarray]:
    """The numbers of the pictures of each latent shape."""
    found: dict[Any, list[np.ndarray]] = {}
    start = 0
    for entry in store.index.shards:
        found.setdefault(entry.shape, []).append(np.arange(start, start + entry.items))
        start += entry.items
    return [np.concatenate(parts) for _, parts in sorted(found.items())]
