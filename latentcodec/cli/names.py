"""File names for pictures that were made of other pictures: no two of one command share a file, none is an original's.

Shapes: none.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, count
from pathlib import Path, PurePosixPath

from latentcodec.printable import existing

LONGEST_NAME = 240  # bytes of UTF-8; file systems take 255, with the suffix


class Names:
    """A file name for each picture, no two the same: its id, in a folder of its source where there are several."""

    def __init__(self, sources: Iterable[str], suffix: str) -> None:
        """`sources`: of all pictures."""
        self.suffix, self._taken = suffix, set[Path]()
        self._folders: dict[str, Path] = {}
        taken = set[Path]()
        for source in dict.fromkeys(sources):
            name = _inside(source).name or "root"
            self._folders[source] = _free(chain([name], (f"{name}-{number}" for number in count(2))), taken)

    def of(self, source: str, picture: str) -> Path:
        """The path within the folder: `a.jpg` becomes a.png, and where that is taken a.jpg.png."""
        path = _inside(picture)
        folder = self._folders[source] if len(self._folders) > 1 else Path()
        endings = (f"{path.name}{f'-{number}' if number else ''}{self.suffix}" for number in count())
        names = chain([f"{path.stem}{self.suffix}"], endings)
        return _free((folder / path.parent / name for name in names), self._taken)


def refuse_originals(targets: Iterable[Path], originals: Iterable[str]) -> None:
    """Raises ValueError where a file that is to be written is one of the pictures that it was made of."""
    there = {target.resolve() for target in targets if target.exists()}
    if there and (lost := next((path for path in originals if existing(path).resolve() in there), None)):
        raise ValueError(f"{lost}: this picture would be overwritten by what comes of it; give another --out")


def _free(names: Iterable[str | Path], taken: set[Path]) -> Path:
    """The first of these names that is not taken; it is from now on."""
    found = next(path for name in names if (path := Path(name)) not in taken)
    taken.add(found)
    return found


def _inside(name: str) -> Path:
    """A path or id without what leads out of a folder, each part as long as file systems allow."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "//", "..")]
    return Path(*(part if len(part.encode()) <= LONGEST_NAME else part[:40] + part[-20:] for part in parts))
