"""Where training images come from: a folder, tar shards, a Hugging Face data set, or the drawn set.

A source knows how many images there are and reads image `index`; it knows nothing of order, crops or batches
(`order.py`, `data.py`). Every way in which a path cannot be understood ends here, in a `ValueError` that says
what was tried. Data sets too big to be fetched first are in `remote.py`. Shapes: C channels, H W pixels.
"""

import os
import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import datasets
from pyarrow import compute
from torch import Tensor

from latentcodec.pixels import IMAGE_SUFFIXES, UnreadableImage, decode_image, find_images, image_size
from latentcodec.sources.synthetic import SyntheticSource

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # suffix of a file -> who reads it in `datasets`


class ImageSource(Protocol):
    """Images by number. The same number is the same image in every process and in every run."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call the image in a message: its file, or its data set and row."""

    def read(self, index: int) -> Tensor:
        """The whole image, [C, H, W] float32 in [-1, 1]; `UnreadableImage`, with its name, when it is
        broken."""

    def size(self, index: int) -> tuple[int, int]:
        """Its height and width in pixels, from the file's header alone; `UnreadableImage` when that is
        broken."""


class EncodedSource:
    """What all sources of image files share: they differ only in where the encoded bytes lie."""

    channels: int

    def name(self, index: int) -> str:
        raise NotImplementedError

    def encoded(self, index: int) -> str | bytes:
        """The image's file name, or the bytes of its file."""
        raise NotImplementedError

    def lengths(self) -> list[int]:
        """Bytes of every image's file, none of which is read; -1 where there is no file."""
        raise NotImplementedError

    def content(self, index: int) -> bytes:
        """The bytes of the image's file; `UnreadableImage`, with its name, where there is none."""
        encoded = self.encoded(index)
        try:
            return encoded if isinstance(encoded, bytes) else Path(encoded).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{self.name(index)}: {error.strerror}") from error

    def read(self, index: int) -> Tensor:
        return decode_image(self.encoded(index), self.channels, name=self.name(index))

    def size(self, index: int) -> tuple[int, int]:
        return image_size(self.encoded(index), name=self.name(index))


class FolderSource(EncodedSource):
    """The image files below a folder, in sorted order."""

    def __init__(self, folder: str | Path, channels: int) -> None:
        self.files = [str(file) for file in find_images(Path(folder).resolve())]
        self.channels = channels

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def encoded(self, index: int) -> str:
        return self.files[index]

    def lengths(self) -> list[int]:
        return [_file_length(file) for file in self.files]


class _Member(NamedTuple):
    shard: int
    name: str
    offset: int  # of its bytes within the shard
    length: int


class TarSource(EncodedSource):
    """The images inside uncompressed tar files (WebDataset shards), read in place.

    The headers are walked once, at the start; after that any image is one read away, so that tar shards are
    shuffled and resumed as exactly as a folder. `field` picks one of several images of a sample: "jpg", or
    "mask.png".
    """

    def __init__(self, shards: list[Path], field: str | None, channels: int) -> None:
        self.shards = [str(shard) for shard in shards]
        self.channels = channels
        self.members = [
            member
            for number in range(len(shards))
            for member in _walk_shard(number, self.shards[number], field)
        ]
        if not self.members:
            wanted = f"image named *.{field}" if field else "image"
            raise ValueError(f"{self.shards[0]}: no {wanted} in {len(shards)} tar files (data.image_column)")

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        member = self.members[index]
        return f"{self.shards[member.shard]}:{member.name}"

    def encoded(self, index: int) -> bytes:
        member = self.members[index]
        with open(self.shards[member.shard], "rb") as shard:
            shard.seek(member.offset)
            return shard.read(member.length)

    def lengths(self) -> list[int]:
        return [member.length for member in self.members]


def _walk_shard(number: int, shard: str, field: str | None) -> list[_Member]:
    try:
        with tarfile.open(shard, "r:") as tar:
            return [
                _Member(number, item.name, item.offset_data, item.size)
                for item in tar
                if item.isfile() and _is_wanted(PurePosixPath(item.name), field)
            ]
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard}: not a whole, uncompressed tar file ({error})") from error


def _is_wanted(path: PurePosixPath, field: str | None) -> bool:
    if path.name.startswith("."):  # macOS writes resource forks into its tar files
        return False
    return path.suffix.lower() in IMAGE_SUFFIXES if field is None else path.name.endswith(f".{field}")


class DatasetSource(EncodedSource):
    """One image column of a Hugging Face data set.

    The library is asked for the encoded bytes only (`decode=False`) and `decode_image` does the rest: the
    library's own decoder stops the whole run at the first corrupt image.
    """

    def __init__(self, dataset: datasets.Dataset, label: str, column: str | None, channels: int) -> None:
        self.column = find_image_column(dataset.features, label, column)
        undecoded = datasets.Image(decode=False)
        self.dataset = dataset.select_columns([self.column]).cast_column(self.column, undecoded)
        self.label = label
        self.channels = channels

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.label} row {index}"

    def encoded(self, index: int) -> str | bytes:
        return encoded_cell(self.dataset[index][self.column], self.name(index))

    def lengths(self) -> list[int]:
        found: list[int] = []
        for rows in self.dataset.with_format("arrow").iter(batch_size=1000):
            inside, path = (compute.struct_field(rows[self.column], key) for key in ("bytes", "path"))
            # Of the images inside, arrow reads the offsets only.
            for length, file in zip(compute.binary_length(inside).to_pylist(), path.to_pylist(), strict=True):
                found.append(length if length is not None else -1 if file is None else _file_length(file))
        return found


def _file_length(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:  # such as a link to nowhere: reading the image will say so
        return -1


def encoded_cell(cell: dict[str, Any] | None, name: str) -> str | bytes:
    """The bytes that one undecoded cell of a `datasets.Image` column holds, or the file that it points to."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UnreadableImage(f"{name}: the cell is empty")
    return cell["path"] if cell["bytes"] is None else cell["bytes"]


def find_image_column(features: datasets.Features, label: str, column: str | None) -> str:
    """The column asked for, or the only one that the data set declares to hold images."""
    columns = ", ".join(features)
    if column is not None:
        if column not in features:
            raise ValueError(
                f"{label} has no column {column!r} (data.image_column); its columns are: {columns}"
            )
        return column
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        problem = f"{len(found)} columns of images" if found else "no column declared as images"
        raise ValueError(
            f"{label} has {problem}; name one with data.image_column. Its columns are: {columns}"
        )
    return found[0]


class Place(NamedTuple):
    """What a user says about where images are; `subset` and `split` matter to Hugging Face data sets only."""

    path: str | None
    subset: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return (
            f"{self.path} [{self.split}]"
            if self.subset is None
            else f"{self.path} [{self.subset}, {self.split}]"
        )


def open_source(place: Place, image_column: str | None = None, channels: int = 3) -> ImageSource:
    """Opens a set of images, wholly here, that can be read in any order.

    The path is understood in this order: None is the drawn set; a `.parquet` or `.tar` file; a folder written
    by `datasets.save_to_disk`; a folder that holds parquet files (split by their names, as on the hub) or tar
    files; any other folder, searched for image files; and a name that is nothing here is a data set on the
    Hugging Face hub. In tar files the column is the part of the name after the dot. Raises `ValueError` with
    the path and what was tried when there is nothing to read.
    """
    if place.path is None:
        return SyntheticSource(channels)
    if channels not in (1, 3, 4):
        raise ValueError(
            f"{place.path}: image files give 1 (grey), 3 (RGB) or 4 (RGB, alpha) channels, not {channels}; "
            "only the drawn set, without a data.path, has any number of them"
        )
    path = Path(place.path).expanduser()
    if path.suffix == ".tar" and path.is_file():
        return TarSource([path], image_column, channels)
    if path.is_dir() and not _is_saved_to_disk(path) and next(path.rglob("*.parquet"), None) is None:
        shards = sorted(path.rglob("*.tar"))
        return TarSource(shards, image_column, channels) if shards else FolderSource(path, channels)
    return DatasetSource(load_dataset(place), str(place), image_column, channels)


def load_dataset(place: Place, streaming: bool = False) -> Any:
    """`datasets.load_dataset` for a path or hub id; whatever goes wrong is a `ValueError` about the place."""
    path = Path(str(place.path)).expanduser()
    if not path.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(place.path)):
        raise ValueError(f"{path}: no such file or folder (data.path)")
    if path.is_file() and path.suffix not in BUILDERS:
        raise ValueError(
            f"{path}: a file must be {' or '.join(BUILDERS)} to be read as a data set (data.path)"
        )
    try:
        if path.is_dir() and _is_saved_to_disk(path):
            return _pick_split(datasets.load_from_disk(str(path)), place.split)
        if path.is_file():
            files = {"train": str(path)}
            return datasets.load_dataset(
                BUILDERS[path.suffix], data_files=files, split=place.split, streaming=streaming
            )
        where = str(path) if path.exists() else str(place.path)
        return datasets.load_dataset(where, place.subset, split=place.split, streaming=streaming)
    except Exception as error:  # the library raises dozens of types, the network's and arrow's among them
        tried = "" if path.exists() else ": it is no file or folder here, and on the hub"
        raise ValueError(f"{place}{tried}: {one_line(error)}") from error


def _is_saved_to_disk(folder: Path) -> bool:
    """Whether `datasets` wrote the folder by `save_to_disk`."""
    single = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return single or (folder / "dataset_dict.json").is_file()


def _pick_split(loaded: Any, split: str) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"its splits are: {', '.join(loaded)}")
    return loaded[split]


def one_line(error: Exception) -> str:
    """What an error of somebody else's says, short enough for a message of ours."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 400 else f"{words[:400]} ..."
