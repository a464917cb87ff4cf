"""Which pictures a folder, a tar or a data set holds for an encoding, and what in it is left out, each with its reason.

Sources are folders, image files, glob patterns, uncompressed tars (WebDataset), parquet files and data sets of
`datasets` (a folder of save_to_disk, or a name on the hub).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from latentcodec.pixels import LeftOut, search_folder
from latentcodec.pixels.folders import IMAGE_SUFFIXES, is_read, left_out_clause
from latentcodec.printable import printable
from latentcodec.sources.hub import is_saved_to_disk, one_line
from latentcodec.sources.kinds import FILES, TABLES, files_by_kind, fullest, nothing_to_read
from latentcodec.sources.tars import read_members, why_not
from latentcodec.store.caches import find_caches
from latentcodec.store.items import CACHE, CAPTION_SUFFIX, Columns, Entry, dataset_of


class Listed(NamedTuple):
    """A picture of a source, or what looks like one and is not read."""

    entry: Entry
    reason: str | None = None
    """Why it is left out; None where it is not."""


def list_entries(sources: Iterable[str], columns: Columns = Columns()) -> list[Listed]:  # noqa: B008 - immutable
    """Every picture of `sources`, in their order, those of one source sorted by name; after them what is left out.

    Raises ValueError naming the source where there is nothing to read, and for a picture that is named twice.
    """
    return _once([item for source in sources for item in _listed_in(source, columns)])


def list_caches(folders: Iterable[str]) -> list[Listed]:
    """Every file of latents below `folders`.

    Raises ValueError naming a folder that holds none, and for a file that is named twice.
    """
    listed = []
    for name in folders:
        folder = Path(name).expanduser().resolve()
        listed += [Listed(_file_entry(file, folder, CACHE)) for file in find_caches(folder)]
    return _once(listed)


def _once(listed: list[Listed]) -> list[Listed]:
    """Without what one source leaves out and another reads. Raises ValueError naming a picture that is there twice."""
    read: set[str] = set()
    for entry in (item.entry for item in listed if item.reason is None):
        if entry.path in read:
            raise ValueError(
                f"{entry.path}: named twice; give each folder, file or data set once, and no folder within another"
            )
        read.add(entry.path)
    return [item for item in listed if item.reason is None or item.entry.path not in read]


def _listed_in(source: str, columns: Columns) -> Iterator[Listed]:
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if not path.exists() and glob.has_magic(source):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise ValueError(f"{source}: no file matches this pattern")
        for name in found:
            yield from _listed_in(name, columns)
    elif path.is_dir() and not is_saved_to_disk(path):
        yield from _folder(path.resolve(), columns)
    elif suffix == ".tar" and path.is_file():
        yield from _tar(path.resolve())
    elif path.is_file() and (suffix in IMAGE_SUFFIXES or is_read(suffix)):
        yield Listed(_file_entry(path.parent.resolve() / path.name, path.parent.resolve()))
    elif path.is_file() and suffix != ".parquet":
        raise ValueError(f"{source}: no image file, tar or parquet file")
    elif not path.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"{source}: no such file or folder")
    else:
        yield from _rows(str(path.resolve()) if path.exists() else source, columns)


def _rows(name: str, columns: Columns) -> list[Listed]:
    """The rows of a data set. Raises ValueError naming it where it cannot be read, or has no column of images."""
    source = columns.source(name)
    return [
        Listed(Entry(f"row {row}", source, "row", offset=row))
        for row in range(len(dataset_of(name, columns)))
    ]


def _file_entry(file: Path, folder: Path, kind: str = "file") -> Entry:
    return Entry(printable(file.relative_to(folder).as_posix()), printable(str(folder)), kind)


def _folder(folder: Path, columns: Columns) -> list[Listed]:
    """The pictures of a folder, of the kind that has the most of them; the others are left out.

    Raises ValueError naming the folder where nothing in it can be read.
    """
    found = search_folder(folder)
    files = files_by_kind(found)
    listed = {kind: _of_kind(kind, files, folder, columns) for kind in files}
    read = {kind: [item for item in items if item.reason is None] for kind, items in listed.items()}
    left_out = [item for items in listed.values() for item in items if item.reason is not None]
    if not any(read.values()):
        refused = [LeftOut(item.entry.path, str(item.reason)) for item in left_out]
        raise ValueError(nothing_to_read(folder, found, refused))
    chosen = fullest(read)
    reason = (
        f"beside {len(read[chosen]):,} pictures in {chosen}, which are read; encode it by a name of its own"
    )
    others = [Listed(item.entry, reason) for kind in read if kind != chosen for item in read[kind]]
    unread = [Listed(_file_entry(Path(item.path), folder), item.reason) for item in found.left_out]
    return [*read[chosen], *others, *unread, *left_out]


def _of_kind(kind: str, files: dict[str, list[Path]], folder: Path, columns: Columns) -> list[Listed]:
    """What the files of one kind hold, those that cannot be opened with the reason.

    Raises ValueError naming the first of these where the folder holds no other kind.
    """
    if kind == FILES:
        return [Listed(_file_entry(file, folder)) for file in files[kind]]
    listed: list[Listed] = []
    for path in [folder] if kind == TABLES else files[kind]:
        try:
            listed += _rows(str(folder), columns) if kind == TABLES else _tar(path)
        except ValueError as error:
            if len(files) == 1:
                raise
            lost = files[kind] if kind == TABLES else [path]
            listed += [Listed(_file_entry(file, folder), one_line(error)) for file in lost]
    return listed


def _tar(tar: Path) -> list[Listed]:
    """The pictures of a tar with their captions, sorted by name. Raises ValueError naming it where there is none."""
    try:
        members = {str(PurePosixPath(item.name)): item for item in read_members(tar)}
    except OSError as error:
        raise ValueError(f"{tar}: {error.strerror}") from error
    pictures, left_out = [], []
    for path, item in sorted(members.items(), key=lambda member: member[1].name):
        place = PurePosixPath(path)
        if item.isdir() or place.name.startswith("."):
            continue
        data = members.get(str(PurePosixPath(item.linkname))) if item.islnk() else item
        reason = why_not(item, place, None) if data else "a link to what is not in this tar"
        if reason is None and data and is_read(place.suffix.lower()):
            caption = members.get(str(place.with_suffix(CAPTION_SUFFIX)))
            text = (caption.offset_data, caption.size) if caption and caption.isfile() else (0, -1)
            pictures.append(
                Listed(
                    Entry(
                        printable(item.name), printable(str(tar)), "tar", data.offset_data, data.size, *text
                    )
                )
            )
        elif reason is not None:
            left_out.append(Listed(Entry(printable(item.name), printable(str(tar)), "tar"), reason))
    if not pictures:
        reasons = [LeftOut(item.entry.path, str(item.reason)) for item in left_out]
        raise ValueError(f"{tar}: holds no image{left_out_clause(reasons)}")
    return pictures + left_out
