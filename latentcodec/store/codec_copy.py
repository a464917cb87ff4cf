"""The copy of the codec that a store keeps in its folder `codec`; nobody else's files are put in its place.

Shapes: none.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from latentcodec.codec import LatentCodec
from latentcodec.files import locked, move_folder
from latentcodec.leftovers import unfinished_name
from latentcodec.loading import CONFIG
from latentcodec.store.format import CODEC, StoreError


def require_no_other_codec(codec: LatentCodec, out: Path) -> None:
    """Raises StoreError where a folder that is no store yet has something else than this codec in the copy's place."""
    if not _is_copy(out / CODEC, codec):
        raise StoreError(
            f"{out / CODEC}: is there already, and is not the codec of this store; give the store a folder of its own "
            "(--out), or no copy of the codec (--no-codec)"
        )


def put_codec(codec: LatentCodec, out: Path) -> None:
    """A copy of the codec in a store, whole or not at all; one that is damaged, or of another codec, is replaced.

    Raises StoreError naming a file in its place that no copy has.
    """
    if _is_copy(out / CODEC, codec):
        return
    with locked(out):
        if _is_copy(out / CODEC, codec):  # by now
            return
        beside = out / unfinished_name()
        try:
            codec.save_pretrained(beside)
            _require_no_other_files(out / CODEC, {file.name for file in beside.iterdir()})
            shutil.rmtree(out / CODEC, ignore_errors=True)
            move_folder(beside, out / CODEC, CONFIG)
        except OSError:
            # Where there are no locks, another process may have been faster.
            if not _is_copy(out / CODEC, codec):
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _is_copy(folder: Path, codec: LatentCodec) -> bool:
    """Whether a folder holds this codec."""
    if not folder.is_dir():
        return False
    try:
        return LatentCodec.from_pretrained(folder).fingerprint == codec.fingerprint
    except (ValueError, OSError):
        return False


def _require_no_other_files(folder: Path, saved: set[str]) -> None:
    """Raises StoreError where a folder holds something else than what is `saved` of a codec."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    if others := [path for path in found if path.name not in saved]:
        raise StoreError(
            f"{others[0]}: no file of a codec, and the copy of the codec in this folder has to be written anew; move "
            "the file away"
        )
