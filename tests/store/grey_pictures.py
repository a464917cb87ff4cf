"""Pictures of one grey, tars of them, and which greys a listing of a source holds and leaves out."""

import io
import tarfile

import numpy as np
from PIL import Image

from latentcodec.pixels import decode_image
from latentcodec.store.items import Columns, EntryReader


def picture(grey):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


def tar(path, members):
    """A tar of (name, bytes) or (name, type, target of a link)."""
    with tarfile.open(path, "w") as archive:
        for name, *content in members:
            item = tarfile.TarInfo(name)
            if isinstance(content[0], bytes) and len(content) == 1:
                item.size = len(content[0])
                archive.addfile(item, io.BytesIO(content[0]))
            else:
                item.type, item.linkname = content
                archive.addfile(item)
    return path


def greys(listed):
    reader = EntryReader(Columns(), with_captions=True)
    return [
        round(float(decode_image(reader.picture(entry), 1)[0, 0, 0] + 1) * 127.5)
        for entry, reason in listed
        if reason is None
    ]


def left_out(listed):
    return {entry.id: reason for entry, reason in listed if reason is not None}
