"""The kinds of files in which a folder may hold images, and which of them is read: the one with the most images.

Training and encoding both ask here, so that they read the same images of a folder.

Shapes: none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path

from latentcodec.pixels import IMAGE_SUFFIXES, LeftOut
from latentcodec.pixels.folders import Found, left_out_clause

TABLES, TARS, FILES = "parquet files", "tar files", "image files"


def files_by_kind(found: Found) -> dict[str, list[Path]]:
    """Kind -> files, `TABLES` first and `FILES` last; a kind of which the folder holds no file is not in it."""
    tars = [shard for shard in found.shards if shard.suffix.lower() == ".tar"]
    tables = [shard for shard in found.shards if shard.suffix.lower() != ".tar"]
    files = {TABLES: tables, TARS: tars, FILES: found.images}
    return {kind: paths for kind, paths in files.items() if paths}


def fullest(opened: Mapping[str, Sized]) -> str:
    """The kind with the most images, the first of those that have as many. `opened`: kind -> its images."""
    return max(opened, key=lambda kind: len(opened[kind]))


def nothing_to_read(folder: Path, found: Found, refused: Sequence[LeftOut]) -> str:
    """What to say of a folder of which no kind can be opened. `refused`: files with the reasons."""
    if refused:
        return f"{folder}: nothing in it can be read; {refused[0].path}: {refused[0].reason}"
    return f"{folder}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}){left_out_clause(found.left_out)}"
