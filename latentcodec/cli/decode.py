"""`latentcodec decode`: latents to pictures.

Shapes: B batch, C channels, H W pixels, c latent channels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentcodec.cli.names import Names, refuse_originals
from latentcodec.cli.output import DONE, Device, Json, counting, number_of, say_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Decoded = tuple[list[Path], list[str], Iterator[Tensor]]
    """The name of each picture within the folder, the files that they came from, if any, and each as [1, C, H, W],
    decoded when it is asked for."""


def decode(
    latents: Annotated[
        Path, typer.Argument(help="Folder of a store, or a .safetensors or .npy file with latents.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.", show_default=False)],
    codec: Annotated[str | None, typer.Option(help="By default the copy in the store.")] = None,
    form: Annotated[str, typer.Option("--format", help="png, jpg or webp.")] = "png",
    first: Annotated[int | None, typer.Option(min=0, help="Decode so many pictures, and no more.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> int:
    """Decode a store, or one file of latents, into picture files.

    latentcodec decode latents --out pictures

    latentcodec decode latent.safetensors --codec photo-f8c16 --out pictures
    """
    from latentcodec.machine import usable_device
    from latentcodec.pixels import WRITERS, save_image

    suffix = f".{form.lower().lstrip('.')}"
    if suffix not in WRITERS:
        *others, final = (name[1:] for name in WRITERS)
        raise ValueError(f"--format {form}: give {', '.join(others)} or {final}")
    if not latents.exists():
        raise ValueError(f"{latents}: there is no such store, and no such file of latents")
    decoded = _of_store if latents.is_dir() else _of_file
    names, originals, pictures = decoded(latents, codec, usable_device(device), suffix)
    targets = [out / name for name in names[:first]]
    refuse_originals(targets, originals)
    with counting(len(targets), "picture") as advance:
        for target, picture in zip(targets, pictures, strict=False):  # no more are decoded than are wanted
            save_image(picture, target)
            advance(1, 0)
    print(f"{number_of(len(targets), 'picture')}: {out}")
    say_json(as_json, {"items": len(targets)})
    return DONE


def _of_store(folder: Path, given: str | None, device: torch.device, suffix: str) -> Decoded:
    """The pictures of a store, decoded by the codec given or by the copy in the store."""
    from latentcodec.codec import LatentCodec, run_compiled
    from latentcodec.store import LatentStore

    store = LatentStore(folder)
    if given is None:
        codec = store.codec(device)
    else:
        codec = LatentCodec.from_pretrained(given, device=device)
        LatentStore(folder, codec)  # refuses another codec than the one that made the latents
    run_compiled(codec)
    filled = [number for number, entry in enumerate(store.index.shards) if entry.items]
    keys = [key for number in filled for key in store.shard(number).pictures()]
    names = Names((source for source, _ in keys), suffix)
    return (
        [names.of(*key) for key in keys],
        [f"{source}/{name}" for source, name in keys],
        (codec.decode(item.latent[None].float(), size=item.size) for item in store),
    )


def _of_file(path: Path, given: str | None, device: torch.device, suffix: str) -> Decoded:
    """The pictures of one file of latents, [c, h, w] or [B, c, h, w]."""
    from latentcodec.codec import LatentCodec, run_compiled
    from latentcodec.store.caches import read_latents

    z = read_latents(path)  # first: a picture needs no codec to be refused
    if given is None:
        raise ValueError(f"{path}: a file of latents does not say which codec made it; give --codec")
    z = z[None] if z.ndim == 3 else z
    codec = run_compiled(LatentCodec.from_pretrained(given, device=device))
    numbers = [""] if len(z) == 1 else [f"-{number:04}" for number in range(len(z))]
    names = [Path(f"{path.stem}{number}{suffix}") for number in numbers]
    return names, [], (codec.decode(one[None]) for one in z)
