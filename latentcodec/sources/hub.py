"""Data sets of the Hugging Face `datasets` library: on its hub, in parquet files, in folders that it saved.

The library takes a second to import, so only the functions that need it do that. Shapes: none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from latentcodec.pixels import LeftOut, UnreadableImage, search_folder
from latentcodec.sources.encoded import EncodedSource, file_length
from latentcodec.sources.kinds import TABLES, files_by_kind
from latentcodec.sources.labels import Labels

if TYPE_CHECKING:
    import datasets

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # suffix of a file -> who reads it in `datasets`
SPLIT_WORDS = {  # split -> what its files or folders are called
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


class DatasetSource(EncodedSource):
    """One image column of a Hugging Face data set.

    The library is asked for the encoded bytes only (`decode=False`) and `decode_image` does the rest: the
    library's own decoder stops the whole run at the first corrupt image.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        label: str,
        column: str | None,
        channels: int,
        label_column: str | None = None,
    ) -> None:
        self.column = find_image_column(dataset.features, label, column)
        self.labels = None if label_column is None else read_labels(dataset, label, label_column)
        self.dataset = undecoded(dataset.select_columns([self.column]), self.column, label)
        self.label = label
        self.left_out: list[LeftOut] = []
        self.channels = channels

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.label} row {index}"

    def encoded(self, index: int) -> str | bytes:
        return encoded_cell(self.dataset[index][self.column], self.name(index))

    def lengths(self) -> list[int]:
        from pyarrow import compute

        found: list[int] = []
        for rows in self.dataset.with_format("arrow").iter(batch_size=1000):
            inside, path = (compute.struct_field(rows[self.column], key) for key in ("bytes", "path"))
            # Of the images inside, arrow reads the offsets only.
            for length, file in zip(compute.binary_length(inside).to_pylist(), path.to_pylist(), strict=True):
                found.append(length if length is not None else -1 if file is None else file_length(file))
        return found


def read_labels(dataset: datasets.Dataset, label: str, column: str) -> Labels:
    """The classes of a data set's rows: a ClassLabel with its names, whole numbers, or words."""
    import datasets

    if column not in dataset.features:
        columns = ", ".join(dataset.features)
        raise ValueError(f"{label} has no column {column!r} (data.label_column); its columns are: {columns}")
    feature = dataset.features[column]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    return Labels.of(dataset[column][:], names, f"{label}: column {column!r} (data.label_column)")


def encoded_cell(cell: dict[str, Any] | None, name: str) -> str | bytes:
    """The bytes that one undecoded cell of a `datasets.Image` column holds, or the file that it points to."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UnreadableImage(f"{name}: the cell is empty")
    return cell["path"] if cell["bytes"] is None else cell["bytes"]


def undecoded(dataset: Any, column: str, label: str) -> Any:
    """The data set with its image column as it is stored: bytes, or the name of a file."""
    import datasets

    try:
        return dataset.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # arrow's, of many types
        raise ValueError(f"{label}: column {column!r} cannot be read as images: {one_line(error)}") from error


def find_image_column(
    features: datasets.Features, label: str, column: str | None, key: str = "data.image_column"
) -> str:
    """The column asked for by `key`, or the only one that the data set declares to hold images.

    Raises `ValueError` naming the column for one that holds something else than an image a row.
    """
    import datasets

    columns = ", ".join(features)
    if column is not None:
        if column not in features:
            raise ValueError(f"{label} has no column {column!r} ({key}); its columns are: {columns}")
        if problem := _why_no_image(features[column]):
            raise ValueError(f"{label}: column {column!r} ({key}) holds {problem}")
        return column
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    lists = [name for name, feature in features.items() if _is_list_of_images(feature)]
    if not found and lists:
        raise ValueError(f"{label}: column {lists[0]!r} holds {_why_no_image(features[lists[0]])}")
    if len(found) != 1:
        problem = f"{len(found)} columns of images" if found else "no column declared as images"
        raise ValueError(f"{label} has {problem}; name one with {key}. Its columns are: {columns}")
    return found[0]


def _why_no_image(feature: Any) -> str | None:
    """What a column holds instead of an image a row; None where each cell may be one: an image, bytes or a path."""
    import datasets

    if _is_list_of_images(feature):
        return "lists of images, and an image a row is needed: write a data set with one row for each image"
    if isinstance(feature, datasets.Image):
        return None
    if isinstance(feature, datasets.Value) and feature.dtype in (
        "binary",
        "large_binary",
        "string",
        "large_string",
    ):
        return None
    if isinstance(feature, dict) and {"bytes", "path"} == feature.keys():
        return None
    kind = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
    return f"{kind}, and images, bytes of image files or their paths are needed"


def _is_list_of_images(feature: Any) -> bool:
    import datasets

    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    return isinstance(inner, datasets.Image) or (inner is not None and _is_list_of_images(inner))


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


def load_dataset(place: Place, streaming: bool = False) -> Any:
    """`datasets.load_dataset` for a path or hub id; whatever goes wrong is a `ValueError` about the place."""
    import datasets

    path = Path(str(place.path)).expanduser()
    if not path.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(place.path)):
        raise ValueError(f"{path}: no such file or folder (data.path)")
    if path.is_file() and path.suffix not in BUILDERS:
        raise ValueError(
            f"{path}: a file must be {' or '.join(BUILDERS)} to be read as a data set (data.path)"
        )
    try:
        if path.is_dir() and is_saved_to_disk(path):
            return _pick_split(datasets.load_from_disk(str(path)), place.split)
        if path.is_file():
            files = {"train": str(path)}
            return datasets.load_dataset(
                BUILDERS[path.suffix], data_files=files, split=place.split, streaming=streaming
            )
        if (
            path.is_dir()
            and place.subset is None
            and not streaming
            and (tables := _tables_among_others(path))
        ):
            return datasets.load_dataset("parquet", data_files=tables, split=place.split)
        where = str(path) if path.exists() else str(place.path)
        return datasets.load_dataset(where, place.subset, split=place.split, streaming=streaming)
    except Exception as error:  # the library raises dozens of types, the network's and arrow's among them
        tried = "" if path.exists() else ": it is no file or folder here, and on the hub"
        root = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise ValueError(f"{place}{tried}: {one_line(root or error)}") from error


def _tables_among_others(folder: Path) -> dict[str, list[str]]:
    """Split -> parquet files, of a folder that holds images of other kinds too; nothing for other folders.

    `datasets` would take such a folder for a set of whatever most of its files are, captions included. Files that name
    no split are all of `train`; a README.md that says which files belong to the set is left to `datasets`.
    """
    files = files_by_kind(search_folder(folder))
    card = folder / "README.md"
    if (
        TABLES not in files
        or len(files) == 1
        or (card.is_file() and "configs:" in card.read_text(errors="replace"))
    ):
        return {}
    named: dict[str, list[str]] = {}
    for table in files[TABLES]:
        words = {*re.split(r"[-._ 0-9/]+", table.relative_to(folder).as_posix())}
        for split in (split for split, its_words in SPLIT_WORDS.items() if words & its_words):
            named.setdefault(split, []).append(str(table))
    return named or {"train": [str(table) for table in files[TABLES]]}


def is_saved_to_disk(folder: Path) -> bool:
    """Whether `datasets` wrote the folder by `save_to_disk`."""
    single = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return single or (folder / "dataset_dict.json").is_file()


def _pick_split(loaded: Any, split: str) -> datasets.Dataset:
    import datasets

    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"its splits are: {', '.join(loaded)}")
    return loaded[split]


def one_line(error: BaseException) -> str:
    """What an error of somebody else's says, short enough for a message of ours."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 400 else f"{words[:400]} ..."
