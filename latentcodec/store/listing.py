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
    listed = [item for source in sources for item in _listed_in(source, columns)]
    seen: set[tuple[str, str]] = set()
    for entry, _ in listed:
        if (key := (entry.source, entry.id)) in seen:
            raise ValueError(f"{entry.path}: named twice; give each folder, file or data set once")
        seen.add(key)
    return listed


def list_caches(folders: Iterable[str]) -> list[Listed]:
    """Every file of latents below `folders`. Raises ValueError naming a folder that holds none."""
    listed = []
    for name in folders:
        folder = Path(name).expanduser().resolve()
        listed += [Listed(_file_entry(file, folder, CACHE)) for file in find_caches(folder)]
    return listed


def _listed_in(source: str, columns: Columns) -> Iterator[Listed]:
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if not path.exists() and glob.has_magic(source):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise ValueError(f"{source}: no file matches this pattern")
        for name in found:
            yield from _listed_in(name, columns)
    elif path.is_dir() and not _is_dataset(path):
        yield from _folder(path.resolve())
    elif suffix == ".tar" and path.is_file():
        yield from _tar(path.resolve())
    elif path.is_file() and (suffix in IMAGE_SUFFIXES or is_read(suffix)):
        yield Listed(_file_entry(path.parent.resolve() / path.name, path.parent.resolve()))
    elif path.is_file() and suffix != ".parquet":
        raise ValueError(f"{source}: no image file, tar or parquet file")
    elif not path.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"{source}: no such file or folder")
    else:
        name = str(path.resolve()) if path.exists() else source
        rows = len(dataset_of(name, columns))
        width = len(str(rows))
        yield from (Listed(Entry(f"row {row:0{width}}", name, "row", offset=row)) for row in range(rows))


def _is_dataset(folder: Path) -> bool:
    saved = (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()
    return saved or next(folder.rglob("*.parquet"), None) is not None


def _file_entry(file: Path, folder: Path, kind: str = "file") -> Entry:
    return Entry(printable(file.relative_to(folder).as_posix()), printable(str(folder)), kind)


def _folder(folder: Path) -> list[Listed]:
    """The pictures of a folder: image files, or those in tars where they are more; the others are left out."""
    found = search_folder(folder)
    files = [Listed(_file_entry(file, folder)) for file in found.images]
    tars: list[Listed] = []
    for shard in found.shards:
        try:
            tars += _tar(shard) if shard.suffix.lower() == ".tar" else []
        except ValueError as error:
            if not files:
                raise
            tars.append(Listed(_file_entry(shard, folder), str(error)))
    if not files and not tars:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{folder}: holds no image ({kinds}){left_out_clause(found.left_out)}")
    in_tars = [item for item in tars if item.reason is None]
    kept, others, kind = (
        (files, in_tars, "image files") if len(files) > len(in_tars) else (in_tars, files, "tars")
    )
    reason = f"beside {len(kept):,} pictures in {kind}, which are read; encode it by a name of its own"
    left_out = [Listed(_file_entry(Path(item.path), folder), item.reason) for item in found.left_out]
    left_out += [item for item in tars if item.reason is not None]
    return [*kept, *(Listed(other.entry, reason) for other in others), *left_out]


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
