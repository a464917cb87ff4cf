"""Which image files a folder holds, and which files in it look like pictures and are not read.

A file is opened only where its suffix does not say what it is, to see whether it begins as a picture does.

Shapes: none.
"""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from latentcodec.files import read_start
from latentcodec.pixels.containers import PLUGINS, enable, install_hint, looks_like_a_picture

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
)
"""Of files that are always read; `containers.PLUGINS` has more, if their packages are here."""
# Pictures of kinds that are not read: convert them first.
OTHERS = """
.jp2 .j2k .j2c .jpc .jpf .jpx .jpm .jxr .wdp .hdp .jls .jpe .jif .jpg_large .psd .psb .xcf .kra .ai .exr .hdr .tga .dds
.ktx .dib .pcx .ppm .pgm .pbm .pnm .pfm .ico .cur .icns .svg .eps .wmf .emf .pdf .djvu .fits .dcm .qoi .bpg .flif .avci
.avifs .heics .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw .3fr .iiq .x3f .raw
"""
ARCHIVES = ".zip .rar .7z .gz .tgz .bz2 .xz .zst"
# What lies beside pictures and is none, so that it is not opened to find out.
COMPANIONS = """
.txt .caption .json .jsonl .csv .tsv .xml .html .htm .md .yaml .yml .toml .ini .log .url .py .npy .npz .pt .pth .db
.safetensors .arrow .mp4 .mov .webm .mkv .avi .mp3 .wav
"""
OTHER_SUFFIXES, ARCHIVE_SUFFIXES = frozenset(OTHERS.split()), frozenset(ARCHIVES.split())
COMPANION_SUFFIXES = frozenset(COMPANIONS.split())
SHARD_SUFFIXES = frozenset({".tar", ".parquet"})


class LeftOut(NamedTuple):
    """A file that looks like a picture and is not read."""

    path: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What a folder holds; every list is sorted."""

    images: list[Path] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    """Tar and parquet files."""
    left_out: list[LeftOut] = field(default_factory=list)


def find_images(folder: str | Path) -> list[Path]:
    """Every image file below `folder`, sorted; recognised by its suffix, in any case (`IMAGE_SUFFIXES`, and those of
    the formats whose packages are here).

    Names that start with a dot are left out, files and folders alike: they are thumbnails, caches and the resource
    forks of macOS. Links to files are followed, links to folders are not. FIFOs, devices and sockets are never opened.
    Raises `ValueError` naming the folder, and what else is in it, if it does not exist, cannot be listed or holds no
    image.
    """
    found = search_folder(folder)
    if not found.images:
        raise ValueError(
            f"{folder}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}){left_out_clause(found.left_out)}"
        )
    return found.images


def search_folder(folder: str | Path) -> Found:
    """What `find_images` finds, beside what it leaves out. Raises `ValueError` where a folder cannot be listed."""
    require_folder(folder)
    found = Found()
    for entry in _files(folder):
        suffix = Path(entry.name).suffix.lower()
        reason = _why_not(entry, suffix)
        if reason is not None:
            found.left_out.append(LeftOut(entry.path, reason))
        elif suffix in IMAGE_SUFFIXES or suffix in PLUGINS:
            found.images.append(Path(entry.path))
        elif suffix in SHARD_SUFFIXES:
            found.shards.append(Path(entry.path))
    for items in (found.images, found.shards, found.left_out):
        items.sort()
    return found


def require_folder(folder: str | Path) -> None:
    """Raises ValueError naming it where there is nothing under this name, or no folder."""
    if not Path(folder).exists():
        raise ValueError(f"{folder}: there is no such folder")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: is no folder; give one")


def is_read(suffix: str) -> bool:
    """Whether files of this suffix, in lower case, are images that are read here."""
    return suffix in IMAGE_SUFFIXES or (suffix in PLUGINS and enable(PLUGINS[suffix]))


def not_read(suffix: str) -> str | None:
    """Why files of this suffix, which look like pictures, are not read; None for those that are, and for others."""
    if suffix in PLUGINS and not enable(PLUGINS[suffix]):
        return f"{suffix} {install_hint(PLUGINS[suffix])}"
    if suffix in OTHER_SUFFIXES:
        return f"{suffix} files are not read; convert them"
    if suffix in ARCHIVE_SUFFIXES:
        return f"{suffix} archives are not read; unpack them"
    return None


def left_out_clause(left_out: list[LeftOut]) -> str:
    """ ", but ..." for the message that nothing is there to read; nothing if nothing was left out."""
    return f"; left out: {counted(left_out)}" if left_out else ""


def counted(left_out: list[LeftOut]) -> str:
    """How many were left out for which reason, the most frequent first: "8 (.heic needs ...), 1 (a FIFO ...)"."""
    reasons: dict[str, int] = {}
    for item in left_out:
        reasons[item.reason] = reasons.get(item.reason, 0) + 1
    ranked = sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{number} ({reason})" for reason, number in ranked)


def _files(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """All that is no folder below `folder`, links to folders too. Raises `ValueError` for one that cannot be listed."""
    pending = [str(folder)]
    while pending:
        here = pending.pop()
        try:
            with os.scandir(here) as entries:
                listed = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise ValueError(f"{here}: the folder cannot be listed ({error.strerror})") from error
        for entry in listed:
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            else:
                yield entry


def _why_not(entry: os.DirEntry[str], suffix: str) -> str | None:
    """Why a file that looks like a picture is not read; None for one that is, and for what is no picture."""
    if entry.is_dir():  # only a link to one comes here
        return "a link to a folder, which is not followed; give the folder that it leads to"
    is_picture = suffix in IMAGE_SUFFIXES or suffix in PLUGINS
    if (is_picture or suffix in SHARD_SUFFIXES) and not entry.is_file() and (kind := _kind(entry)):
        return f"a {kind}, which is never opened"
    if reason := not_read(suffix):
        return reason
    if is_picture or suffix in SHARD_SUFFIXES | COMPANION_SUFFIXES or not entry.is_file():
        return None
    if looks_like_a_picture(read_start(entry.path)):
        return "a picture whose name has not the suffix of one; rename it"
    return None


def _kind(entry: os.DirEntry[str]) -> str | None:
    """What is neither a file nor a link to nowhere, which reading will complain of."""
    try:
        mode = entry.stat().st_mode
    except OSError:
        return None
    kinds: dict[str, Callable[[int], bool]] = {
        "FIFO": stat.S_ISFIFO,
        "socket": stat.S_ISSOCK,
        "device": _is_device,
    }
    return next((kind for kind, is_kind in kinds.items() if is_kind(mode)), None)


def _is_device(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
