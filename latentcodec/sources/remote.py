"""Sets too big to be fetched before training: images that are read one after another, each once an epoch.

A stream cannot be asked for image number i. It is cut into lanes, one for each worker process of each rank,
and a lane's order is a pure function of (seed, epoch, lane, number of lanes). Hence, unlike sets that are
wholly here, the data depends on the number of ranks and workers. With the same numbers a resumed run sees
exactly what an uninterrupted one would have seen, but it has to read (not decode) its way there from the
beginning. Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from latentcodec.pixels import LeftOut, decode_image
from latentcodec.randomness import Purpose, keyed_generator
from latentcodec.sources.encoded import EncodedSource, SourceFailed
from latentcodec.sources.hub import Place, encoded_cell, find_image_column, load_dataset, one_line, undecoded

if TYPE_CHECKING:
    import datasets

Cell = dict[str, Any] | None  # an undecoded image: {"bytes": ..., "path": ...}


class RemoteSource:
    """One image column of a streamed Hugging Face data set: on the hub, in parquet files or in tar shards."""

    def __init__(self, place: Place, column: str | None, channels: int, buffer: int) -> None:
        import datasets

        self.label, self.channels, self.buffer = str(place), channels, buffer
        dataset = load_dataset(place, streaming=True)
        if isinstance(dataset, datasets.Dataset):
            raise ValueError(f"{self.label} is on this disk, ready to be read: leave out data.streaming")
        if dataset.features is None:
            raise ValueError(f"{self.label} declares no columns; it cannot be read with data.streaming")
        self.column = find_image_column(dataset.features, self.label, column)
        self.dataset = undecoded(dataset.select_columns([self.column]), self.column, self.label)
        self.left_out: list[LeftOut] = []
        self._excluded: set[str] = set()

    def first(self, count: int) -> CellSource:
        """The first `count` images of the data set, fetched now."""
        return CellSource(self, list(itertools.islice(self._read(self.dataset), count)))

    def exclude(self, cells: list[Cell]) -> None:
        """Drops these images, and every copy of them, from all lanes."""
        self._excluded |= {_digest(cell) for cell in cells}

    def name(self, cell: Cell) -> str:
        """The file name where the data set gives one, else a digest of the content."""
        return f"{self.label} image {(cell and cell['path']) or _digest(cell)}"

    def decode(self, cell: Cell) -> Tensor:
        """[C, H, W] float32 in [-1, 1]; `UnreadableImage`, with the image's name."""
        name = self.name(cell)
        return decode_image(encoded_cell(cell, name), self.channels, name=name)

    def lane(self, lane: int, lanes: int, seed: int, skip: int) -> Iterator[Cell]:
        """The endless sequence of images of one lane of `lanes`, from its image number `skip` on."""
        return itertools.islice(self._lane_from_start(lane, lanes, seed), skip, None)

    def _lane_from_start(self, lane: int, lanes: int, seed: int) -> Iterator[Cell]:
        from datasets.distributed import split_dataset_by_node

        for epoch in itertools.count():
            epoch_seed = keyed_generator(seed, Purpose.ORDER, epoch).initial_seed()
            order = self.dataset.shuffle(seed=epoch_seed, buffer_size=self.buffer)
            empty = True
            for cell in self._read(split_dataset_by_node(order, lane, lanes)):
                if _digest(cell) not in self._excluded:
                    empty = False
                    yield cell
            if empty:
                raise ValueError(
                    f"{self.label}: nothing is left to train on for worker {lane + 1} of {lanes}: use fewer "
                    "data.workers, or lower data.val_images"
                )

    def _read(self, dataset: datasets.IterableDataset) -> Iterator[Cell]:
        try:
            # Not iter(dataset): in a worker process that would divide the lane between the workers once more.
            for batch in dataset.iter(batch_size=1):
                yield batch[self.column][0]
        except Exception as error:  # of the network, the file system or the format: dozens of types
            raise SourceFailed(f"{self.label}: reading the stream failed: {one_line(error)}") from error


class CellSource(EncodedSource):
    """A few images of a remote set, kept in memory."""

    def __init__(self, remote: RemoteSource, cells: list[Cell]) -> None:
        self.remote, self.cells, self.channels = remote, cells, remote.channels
        self.left_out: list[LeftOut] = []

    def __len__(self) -> int:
        return len(self.cells)

    def name(self, index: int) -> str:
        return self.remote.name(self.cells[index])

    def encoded(self, index: int) -> str | bytes:
        return encoded_cell(self.cells[index], self.name(index))

    def lengths(self) -> list[int]:
        return [-1 if cell is None or cell["bytes"] is None else len(cell["bytes"]) for cell in self.cells]


def _digest(cell: Cell) -> str:
    content = b"" if cell is None else cell["bytes"] or str(cell["path"]).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()
