"""Sets of images for the tests of the training data.

Most hold plain images whose colour is their number, so that a crop tells which image it was cut from.
"""

import io
import tarfile
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from latentcodec.pixels import to_uint8
from latentcodec.training.data.config import DataConfig
from latentcodec.training.data.images import open_images
from latentcodec.training.data.stream import training_batches

# The library's cache goes to a folder that ends with the tests; its progress bars and its sleeps go nowhere.
_cache = tempfile.TemporaryDirectory()
datasets.config.HF_DATASETS_CACHE = Path(_cache.name)
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.01
datasets.disable_progress_bars()


def plain(number: int, size: tuple[int, int] = (20, 24)) -> bytes:
    """A PNG file of one colour that says which image it is; size is height, width."""
    file = io.BytesIO()
    Image.new("RGB", (size[1], size[0]), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path, count: int, size: tuple[int, int] = (20, 24)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:04}.png").write_bytes(plain(number, size))
    return folder


def write_photos(folder: Path, count: int) -> Path:
    """Files with structure, so that place, scale and mirroring of a crop show."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        noise = random.integers(0, 256, (8, 8 + number % 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((44 + number, 36), Image.Resampling.BICUBIC).save(
            folder / f"{number}.jpg"
        )
    return folder


def table(numbers, cells=None) -> datasets.Dataset:
    cells = cells or [{"bytes": plain(number), "path": f"{number}.png"} for number in numbers]
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"picture": cells, "label": list(numbers)}, features=features)


def numbers_in(batch) -> list[int]:
    """Which images the crops of a batch were cut from."""
    corner = to_uint8(batch["pixels"])[:, :2, 0, 0].int()
    return (corner[:, 0] + 256 * corner[:, 1]).tolist()


def write_set(root: Path, kind: str, numbers, cells=None) -> Path:
    """The same images, stored in another way."""
    root = root / kind
    if kind == "folder":
        root.mkdir()
        for number in numbers:
            (root / f"{number:04}.png").write_bytes(plain(number))
    elif kind == "saved":
        table(numbers, cells).save_to_disk(root)
    elif kind == "saved splits":
        datasets.DatasetDict({"train": table(numbers, cells)}).save_to_disk(root)
    elif kind == "parquet":
        root = root.with_suffix(".parquet")
        table(numbers, cells).to_parquet(root)
    elif kind == "parquet folder":
        (root / "data").mkdir(parents=True)
        table(numbers, cells).to_parquet(root / "data/train-00000-of-00001.parquet")
        table([999]).to_parquet(root / "data/validation-00000-of-00001.parquet")
    elif kind == "tar":
        root.mkdir()
        numbers = list(numbers)
        for shard, part in enumerate([numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]]):
            files = {f"{n:04}.png": plain(n) for n in part} | {f"{n:04}.json": b"{}" for n in part}
            write_tar(root / f"{shard}.tar", dict(sorted(files.items())))
    return root


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def write_bad_files(folder: Path) -> list[Path]:
    """Files that no reader may accept, each broken in another way."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    encoded = {}
    for form in ("JPEG", "PNG", "WEBP", "TIFF"):
        file = io.BytesIO()
        noise.save(file, form)
        encoded[form] = file.getvalue()
    bomb = bytearray(plain(0))
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2  # the size in the header of a PNG file
    floats = io.BytesIO()
    Image.new("F", (9, 9)).save(floats, "TIFF")
    kinds = {
        "empty.png": b"",
        "half.jpg": encoded["JPEG"][: len(encoded["JPEG"]) // 2],
        "half.png": encoded["PNG"][: len(encoded["PNG"]) // 2],
        "half.webp": encoded["WEBP"][: len(encoded["WEBP"]) // 2],
        "header.jpg": encoded["JPEG"][:20],
        "page.jpg": b"<html>404: not found</html>",
        "zeros.png": bytes(1000),
        "bomb.png": bytes(bomb),
        "floats.tif": floats.getvalue(),
        "photoshop.png": b"8BPS\0\1" + bytes(100),
    }
    for name, content in kinds.items():
        (folder / name).write_bytes(content)
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    return [folder / name for name in [*kinds, "dangling.png"]]


def write_shards(folder: Path, count: int, shards: int, bad: tuple[int, ...] = ()) -> Path:
    folder.mkdir()
    for shard in range(shards):
        numbers = range(shard, count, shards)
        cells = [{"bytes": b"?" if n in bad else plain(n), "path": f"{n}.png"} for n in numbers]
        table(numbers, cells).to_parquet(folder / f"train-{shard:05}-of-{shards:05}.parquet")
    return folder


def config_of(path, **settings) -> DataConfig:
    settings = {"workers": 0, "val_images": 0, "resolution": 16, **settings}
    return DataConfig(path=None if path is None else str(path), **settings)


def read(config: DataConfig, steps: int, batch_size: int = 4, seed: int = 3, **rank) -> list:
    return list(training_batches(open_images(config, 3, seed), batch_size, steps=steps, **rank))


def assert_same_stream(ours, expected):
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one["position"], other["position"])
        assert torch.equal(one["pixels"], other["pixels"])
        assert one["rejects"] == other["rejects"]
