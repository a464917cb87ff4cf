"""The pictures of an encoding, each with what is needed to read it in any process.

Sources are folders, image files, glob patterns, uncompressed tars (WebDataset shards), parquet files and data sets of
`datasets` (a folder of save_to_disk, or a name on the hub). An `Entry` is a few words and numbers, so that a plan can
hold millions, and `EntryReader` gets a picture's bytes and caption from it. What becomes of the bytes is in
`picture.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from latentcodec.files import open_regular, read_regular
from latentcodec.pixels import UnreadableImage
from latentcodec.printable import existing

CACHE = "cache"  # kind of an entry that is another program's file of latents
CAPTION_SUFFIX = ".txt"
CAPTIONS_FROM_FILES = "txt"


class Entry(NamedTuple):
    """One picture and where its bytes lie."""

    id: str
    """Its path within its source, with forward slashes; for a data set `row N`."""
    source: str
    """The folder, tar or data set that it came from, as `Columns.source` has it: (source, id) names a picture."""
    kind: str
    """`file`, `tar`, `row`, or `cache` for a file of latents."""
    offset: int = 0
    """Of the picture's bytes in the tar, or the row's number."""
    length: int = 0
    """Bytes of the picture in the tar."""
    caption_offset: int = 0
    caption_length: int = -1
    """Of the caption in the tar; -1: there is none."""

    @property
    def path(self) -> str:
        """What messages and rejects.jsonl call the picture."""
        if self.kind in ("file", CACHE):
            return f"{self.source}/{self.id}"
        return f"{self.source}:{self.id}" if self.kind == "tar" else f"{self.source} {self.id}"


class Columns(NamedTuple):
    """Where a data set has its pictures, captions and labels."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    subset: str | None = None
    split: str = "train"

    def source(self, name: str) -> str:
        """What entries call a data set, ` [subset, split]` behind its name: its splits are other pictures.

        The split that is taken by default is not named, as in stores from before others were.
        """
        if (self.subset, self.split) == (None, "train"):
            return name
        return f"{name} [{', '.join(filter(None, (self.subset, self.split)))}]"

    def name(self, source: str) -> str:
        """The data set of a source."""
        return source.removesuffix(self.source(""))


class EntryReader:
    """Gets bytes, caption and label of an entry; can be sent to another process."""

    def __init__(self, columns: Columns, with_captions: bool) -> None:
        self.columns, self.with_captions = columns, with_captions

    def picture(self, entry: Entry) -> str | bytes:
        """The picture's file, or the bytes of one. Raises UnreadableImage where there are none."""
        if entry.kind == "file":
            return str(existing(entry.path))
        if entry.kind == "tar":
            return _read(entry.source, entry.offset, entry.length, entry.path)
        from latentcodec.sources.images import encoded_cell

        return encoded_cell(
            self._row(entry)[_image_column(self.columns.name(entry.source), self.columns)], entry.path
        )

    def caption_and_label(self, entry: Entry) -> tuple[str | None, int | None]:
        """The text that belongs to the picture, stripped, and its class; None where there is none.

        Raises UnreadableImage naming the picture where they are of another type, or no UTF-8.
        """
        label = caption = None
        if entry.kind == "row":
            row = self._row(entry)
            caption = row[self.columns.caption] if self.columns.caption else None
            label = row[self.columns.label] if self.columns.label else None
        elif self.with_captions:
            caption = _caption_of_file(entry)
        if (
            not isinstance(caption, str | None)
            or isinstance(label, bool)
            or not isinstance(label, int | None)
        ):
            raise UnreadableImage(
                f"{entry.path}: a caption is text and a label a whole number, not {caption!r} and {label!r}"
            )
        return (caption.strip() if caption else None), label

    def _row(self, entry: Entry) -> dict[str, Any]:
        return dataset_of(self.columns.name(entry.source), self.columns)[entry.offset]


def _caption_of_file(entry: Entry) -> str | None:
    try:
        if entry.kind == "tar":
            if entry.caption_length < 0:
                return None
            text = _read(entry.source, entry.caption_offset, entry.caption_length, entry.path)
        else:
            text = read_regular(existing(entry.path).with_suffix(CAPTION_SUFFIX))
        return text.decode("utf-8-sig")  # editors of Windows put a mark in front
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableImage(f"{entry.path}: its caption cannot be read ({error})") from error


def _read(file: str, offset: int, length: int, name: str) -> bytes:
    try:
        with open_regular(existing(file)) as opened:
            opened.seek(offset)
            content = opened.read(length)
    except OSError as error:
        raise UnreadableImage(f"{name}: {error.strerror}") from error
    if len(content) < length:
        raise UnreadableImage(f"{name}: {file} has become shorter")
    return content


@lru_cache(maxsize=64)
def dataset_of(name: str, columns: Columns) -> Any:
    """The wanted columns of a data set, its pictures undecoded. Raises ValueError naming it."""
    import datasets

    from latentcodec.sources.images import Place, load_dataset

    dataset = load_dataset(Place(name, columns.subset, columns.split))
    image = _image_column_of(dataset, name, columns)
    wanted = [column for column in (image, columns.caption, columns.label) if column]
    for column in wanted:
        if column not in dataset.features:
            raise ValueError(
                f"{name} has no column {column!r}; its columns are: {', '.join(dataset.features)}"
            )
    return dataset.select_columns(wanted).cast_column(image, datasets.Image(decode=False))


def _image_column(name: str, columns: Columns) -> str:
    return _image_column_of(dataset_of(name, columns), name, columns)


def _image_column_of(dataset: Any, name: str, columns: Columns) -> str:
    from latentcodec.sources.images import find_image_column

    return find_image_column(dataset.features, name, columns.image, "--image-column")
