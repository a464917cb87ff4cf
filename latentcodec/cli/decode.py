"""`latentcodec decode`: latents to pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentcodec.cli.names import Names
from latentcodec.cli.output import DONE, Json, counting, number_of, say_json

if TYPE_CHECKING:
    from torch import Tensor

    from latentcodec.codec import LatentCodec
    from latentcodec.store import LatentStore


def decode(
    latents: Annotated[
        Path, typer.Argument(help="Folder of a store, or a .safetensors or .npy file with latents.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.", show_default=False)],
    codec: Annotated[str | None, typer.Option(help="By default the copy in the store.")] = None,
    form: Annotated[str, typer.Option("--format", help="png, jpg or webp.")] = "png",
    first: Annotated[int | None, typer.Option(min=0, help="Decode so many pictures, and no more.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    as_json: Json = False,
) -> int:
    """Decode a store, or one file of latents, into picture files.

    latentcodec decode latents --out pictures

    latentcodec decode latent.safetensors --codec photo-f8c16 --out pictures
    """
    from latentcodec.pixels import WRITERS, save_image
    from latentcodec.store import LatentStore

    suffix = f".{form.lower().lstrip('.')}"
    if suffix not in WRITERS:
        raise ValueError(f"--format {form}: {', '.join(name[1:] for name in WRITERS)}")
    if not latents.exists():
        raise ValueError(f"{latents}: there is no such store, and no such file of latents")
    if latents.is_dir():
        store = LatentStore(latents)
        total = len(store) if first is None else min(first, len(store))
        pictures = _of_store(store, _codec(codec, store, device), total, suffix)
    else:
        if codec is None:
            raise ValueError(f"{latents}: a file of latents does not say which codec made it; give --codec")
        found = _of_file(latents, codec, device, suffix)
        total = len(found) if first is None else min(first, len(found))
        pictures = iter(found[:total])
    with counting(total, "pictures") as advance:
        for name, picture in pictures:
            save_image(picture, out / name)
            advance(1, 0)
    print(f"{number_of(total, 'picture')}: {out}")
    say_json(as_json, {"items": total})
    return DONE


def _codec(given: str | None, store: LatentStore, device: str | None) -> LatentCodec:
    from latentcodec.codec import LatentCodec
    from latentcodec.store.read import LatentStore

    if given is None:
        return store.codec(device)
    codec = LatentCodec.from_pretrained(given, device=device)
    LatentStore(store.folder, codec)  # refuses another codec than the one that made the latents
    return codec


def _of_store(
    store: LatentStore, codec: LatentCodec, total: int, suffix: str
) -> Iterator[tuple[Path, Tensor]]:
    """(name within the folder, [1, C, H, W]) of each picture."""
    shards = (store.shard(number) for number, entry in enumerate(store.index.shards) if entry.items)
    names = Names(
        (source for shard in shards for source in shard.batch.column("source").unique().to_pylist()), suffix
    )
    for index in range(total):
        item = store[index]
        yield names.of(item.source, item.id), codec.decode(item.latent[None].float(), size=item.size)


def _of_file(path: Path, codec: str, device: str | None, suffix: str) -> list[tuple[Path, Tensor]]:
    """The pictures of one file of latents, [c, h, w] or [B, c, h, w]."""
    from latentcodec.codec import LatentCodec
    from latentcodec.store.caches import read_latents

    z = read_latents(path)
    if z.ndim == 3:
        z = z[None]
    model = LatentCodec.from_pretrained(codec, device=device)
    numbers = [""] if len(z) == 1 else [f"-{number:04}" for number in range(len(z))]
    names = [f"{path.stem}{number}{suffix}" for number in numbers]
    return [(Path(name), model.decode(one[None])) for name, one in zip(names, z, strict=True)]
