"""Where training images come from: a folder, tar shards, a Hugging Face data set, idx or npz files, or a drawn set.

A source knows how many images there are and reads image `index`; it knows nothing of order, crops or batches.
Every way in which a path cannot be understood ends here, in a `ValueError` that says what was tried. Data sets too
big to be fetched first are in `remote.py`. Shapes: none.
"""

from collections.abc import Callable
from pathlib import Path

from latentcodec.pixels import LeftOut, search_folder
from latentcodec.sources.arrays import ArraySource, idx_files, is_idx, open_idx, open_npz
from latentcodec.sources.digits import DigitSource
from latentcodec.sources.encoded import EncodedSource, ImageSource, file_length
from latentcodec.sources.hub import (
    DatasetSource,
    Place,
    encoded_cell,
    find_image_column,
    is_saved_to_disk,
    load_dataset,
    one_line,
)
from latentcodec.sources.kinds import TABLES, TARS, files_by_kind, fullest, nothing_to_read
from latentcodec.sources.synthetic import SyntheticSource
from latentcodec.sources.tars import TarSource

__all__ = [
    "ArraySource",
    "DatasetSource",
    "EncodedSource",
    "FolderSource",
    "ImageSource",
    "Place",
    "encoded_cell",
    "find_image_column",
    "load_dataset",
    "one_line",
    "open_source",
]


class FolderSource(EncodedSource):
    """Image files, in the order given."""

    def __init__(self, files: list[Path], channels: int, left_out: list[LeftOut]) -> None:
        self.files = [str(file) for file in files]
        self.channels, self.left_out = channels, left_out

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def encoded(self, index: int) -> str:
        return self.files[index]

    def lengths(self) -> list[int]:
        return [file_length(file) for file in self.files]


DRAWN: dict[str, Callable[[int], ImageSource]] = {"pictures": SyntheticSource, "digits": DigitSource}


def open_source(
    place: Place,
    image_column: str | None = None,
    channels: int = 3,
    label_column: str | None = None,
    drawn: str = "pictures",
) -> ImageSource:
    """Opens a set of images, wholly here, that can be read in any order.

    The path is understood in this order: None is the set of `drawn` pictures or digits; a `.parquet`, `.tar`, `.npz` or
    idx file; a folder written by `datasets.save_to_disk`; a folder of idx files, of which the split chooses; a folder
    that holds parquet files (split by their names, as on the hub), tar
    files or image files; and a name that is nothing here is a data set on the Hugging Face hub. Of a folder that holds
    several of these, the kind with the most images is read, and the others are listed as left out. In tar files the
    column is the part of the name after the dot. Raises `ValueError` with the path and what was tried when there is
    nothing to read.
    """
    if place.path is None:
        return DRAWN[drawn](channels)
    if channels not in (1, 3, 4):
        raise ValueError(
            f"{place.path}: image files give 1 (grey), 3 (RGB) or 4 (RGB, alpha) channels, not {channels}; "
            "only the drawn set, without a data.path, has any number of them"
        )
    path = Path(place.path).expanduser()
    if is_idx(path) or (path.is_dir() and idx_files(path)):
        _refuse_column("idx files, which bring their labels along", label_column)
        return open_idx(path, place.split, channels)
    if path.suffix.lower() == ".npz" and path.is_file():
        return open_npz(path, place.split, image_column, label_column, channels)
    if path.suffix.lower() == ".tar" and path.is_file():
        _refuse_column("tar files", label_column)
        return TarSource([path], image_column, channels)
    if path.is_dir() and not is_saved_to_disk(path):
        return _open_folder(place, path.resolve(), image_column, channels, label_column)
    return DatasetSource(load_dataset(place), str(place), image_column, channels, label_column)


def _refuse_column(kind: str, label_column: str | None) -> None:
    if label_column is not None:
        raise ValueError(f"data.label_column {label_column!r}: there are no columns in {kind}; leave it out")


def _open_folder(
    place: Place, path: Path, column: str | None, channels: int, label_column: str | None
) -> EncodedSource:
    """Of what a folder holds, the kind with the most images; a folder of one kind is refused with that kind's words."""
    found = search_folder(path)
    files = files_by_kind(found)
    opened: dict[str, EncodedSource] = {}
    refused: list[LeftOut] = []
    for kind, paths in files.items():
        try:
            if kind == TABLES:
                opened[kind] = DatasetSource(load_dataset(place), str(place), column, channels, label_column)
            elif kind == TARS:
                opened[kind] = TarSource(paths, column, channels)
            else:
                opened[kind] = FolderSource(paths, channels, [])
        except ValueError as error:
            if len(files) == 1:
                raise
            refused += [LeftOut(str(file), one_line(error)) for file in paths]
    if not opened:
        raise ValueError(nothing_to_read(path, found, refused))
    kind = fullest(opened)
    chosen = opened.pop(kind)
    if kind != TABLES:
        _refuse_column("image or tar files", label_column)
    reason = (
        f"beside {len(chosen):,} images in {kind}, which are read; put it into a folder of its own to read it"
    )
    others = [LeftOut(other.name(i), reason) for other in opened.values() for i in range(len(other))]
    chosen.left_out = [*chosen.left_out, *refused, *found.left_out, *others]
    return chosen
