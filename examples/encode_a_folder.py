"""Encode a folder of pictures once, read the latents many times, and decode a few of them.

    python examples/encode_a_folder.py PHOTOS --codec photo-f8c16 --out latents

The same as `latentcodec encode`, from Python. Run again after it was stopped, it goes on; run again when it was
finished, it adds the pictures that are new.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from latentcodec import LatentStore, save_image
from latentcodec.store import encode, prepare, verify


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", help="folder of pictures")
    parser.add_argument("--codec", default="photo-f8c16")
    parser.add_argument("--out", type=Path, required=True, help="folder of the store")
    parser.add_argument("--size", type=int, default=256, help="pixels of the square that is encoded")
    settings = parser.parse_args(arguments)

    prepare([settings.photos], settings.out, settings.codec, size=settings.size, dtype="int8")
    encode(settings.out, progress=lambda done, left_out: print(f"{done} encoded, {left_out} left out"))
    print("intact" if verify(settings.out).ok else "damaged")

    store = LatentStore(settings.out)
    print(f"{len(store)} pictures, {store.index.bytes_per_picture:.0f} bytes each, {store.index.samples}")

    codec = store.codec()  # the copy in the store: nothing else is needed
    for number, item in enumerate(islice(store, 4)):
        picture = codec.decode(item.latent[None], size=item.size)
        save_image(picture, settings.out.with_name("decoded") / f"{number:03}.png")

    for batch in store.dataset(batch_size=8):  # what a training loop sees: shuffled, divided among the ranks
        print(batch["latent"].shape, batch["caption"][0])
        break


if __name__ == "__main__":  # workers that decode pictures import this file
    try:
        main()
    except (ValueError, OSError) as error:  # what the person who runs it can mend
        sys.exit(f"error: {error}")
