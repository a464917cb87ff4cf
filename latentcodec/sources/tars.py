"""The images inside uncompressed tar files (WebDataset shards), read in place.

Shapes: none.
"""

import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from latentcodec.files import open_regular
from latentcodec.pixels import LeftOut
from latentcodec.pixels.folders import is_read, left_out_clause, not_read
from latentcodec.sources.encoded import EncodedSource

BLOCK_BYTES = 1 << 20


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
        self.left_out: list[LeftOut] = []
        self.members: list[_Member] = []
        for number, shard in enumerate(self.shards):
            self._walk(number, shard, field)
        if not self.members:
            wanted = f"image named *.{field}" if field else "image"
            also = left_out_clause(self.left_out)
            raise ValueError(
                f"{self.shards[0]}: no {wanted} in {len(shards)} tar files (data.image_column){also}"
            )

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        member = self.members[index]
        return f"{self.shards[member.shard]}:{member.name}"

    def encoded(self, index: int) -> bytes:
        member = self.members[index]
        with open_regular(self.shards[member.shard]) as shard:
            shard.seek(member.offset)
            return shard.read(member.length)

    def lengths(self) -> list[int]:
        return [member.length for member in self.members]

    def _walk(self, number: int, shard: str, field: str | None) -> None:
        """Find the images of a shard: files and hard links to files of the same shard."""
        members = read_members(shard)
        by_name = {item.name: item for item in members}
        for item in members:
            path = PurePosixPath(item.name)
            if item.isdir() or path.name.startswith("."):  # macOS writes resource forks into its tar files
                continue
            source = by_name.get(item.linkname) if item.islnk() else item
            reason = why_not(item, path, field) if source else "a link to what is not in this tar"
            if reason is not None:
                self.left_out.append(LeftOut(f"{shard}:{item.name}", reason))
            elif source and is_wanted(path, field):
                self.members.append(_Member(number, item.name, source.offset_data, source.size))


def read_members(shard: str | Path) -> list[tarfile.TarInfo]:
    """All members of an uncompressed tar file; raises `ValueError` naming it where there may be more than are found.

    The library takes a broken header for the end, and the end of the first of several joined files for that of all.
    """
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = tar.getmembers()
            file.seek(tar.offset)
            while block := file.read(BLOCK_BYTES):
                if block.strip(b"\0"):
                    raise tarfile.ReadError(
                        f"it goes on after byte {tar.offset:,}, with a broken header or with another tar file; join "
                        "tar files with tar -A"
                    )
            return members
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard}: not a whole, uncompressed tar file ({error})") from error


def why_not(item: tarfile.TarInfo, path: PurePosixPath, field: str | None) -> str | None:
    """Why a member that looks like an image is not read; None for one that is, and for what is none."""
    if is_wanted(path, field):
        if item.issym() or item.ischr() or item.isblk() or item.isfifo():
            return "a link, FIFO or device in a tar file, which is not followed"
        return "a sparse file in a tar file, which is not read" if item.issparse() else None
    return not_read(path.suffix.lower()) if field is None else None


def is_wanted(path: PurePosixPath, field: str | None) -> bool:
    """Whether a member is an image by its name, or the one of its sample that was asked for."""
    return is_read(path.suffix.lower()) if field is None else path.name.endswith(f".{field}")
