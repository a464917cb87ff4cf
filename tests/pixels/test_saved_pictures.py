"""Pictures that are written, whole or not at all, and the folders in which pictures are searched."""

import os

import numpy as np
import pytest
import torch
from encoded_pictures import close
from PIL import Image

from latentcodec import files
from latentcodec.pixels import find_images, from_uint8, load_image, save_image, to_uint8


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_what_is_saved_without_loss_is_loaded_bit_for_bit(suffix, channels, tmp_path):
    levels = torch.randint(0, 256, (1, channels, 9, 13), dtype=torch.uint8)
    levels[:, 3:, ::2] = 0  # invisible pixels keep their colour
    path = tmp_path / "new" / "folder" / f"picture{suffix}"
    save_image(from_uint8(levels), path)
    assert torch.equal(to_uint8(load_image(path, channels)), levels)
    save_image(from_uint8(levels)[0], path)  # without the batch, over the earlier one
    assert torch.equal(to_uint8(load_image(path, channels)), levels)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_jpeg_is_close_and_pixels_out_of_range_are_clamped(tmp_path):
    smooth = torch.linspace(-1.2, 1.2, 64).expand(1, 3, 64, 64)
    for name in ("a.jpg", "a.jpeg"):
        save_image(smooth.bfloat16().requires_grad_(), tmp_path / name)
        close(load_image(tmp_path / name), smooth.clamp(-1, 1), levels=4)


def test_8_bit_tensors_are_written_as_they_are_and_other_integers_are_refused(tmp_path):
    picture = torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8)
    save_image(picture, tmp_path / "a.png")
    assert torch.equal(torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1), picture)
    with pytest.raises(ValueError, match=r"b\.png: .*int64"):
        save_image(picture.long(), tmp_path / "b.png")


@pytest.mark.parametrize(
    ("x", "name", "words"),
    [
        (torch.zeros(3, 4, 4), "a.gif", r"\.png.*'\.gif'"),
        (torch.zeros(3, 4, 4), "a", r"not as ''"),
        (torch.zeros(2, 3, 4, 4), "a.png", r"\[2, 3, 4, 4\]"),
        (torch.zeros(2, 4, 4), "a.png", r"\[2, 4, 4\]"),
        (torch.zeros(3, 0, 4), "a.png", r"\[3, 0, 4\]"),
        (torch.zeros(4, 4), "a.png", r"\[4, 4\]"),
        (torch.full((3, 4, 4), torch.nan), "a.png", "NaN"),
        (torch.zeros(4, 4, 4), "a.jpg", "JPEG"),
        (torch.zeros(1, 1, 17_000), "a.webp", "WEBP"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_leaves_nothing(x, name, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        save_image(x, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["write", "replace"])
def test_an_interrupted_save_leaves_the_earlier_file_and_no_litter(error, where, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    save_image(torch.zeros(3, 8, 8), path)
    before = path.read_bytes()

    def half(path, content, durable):
        path.write_bytes(content[: len(content) // 2])
        raise error

    def fail(*_):
        raise error

    monkeypatch.setattr(*((files, "write_file", half) if where == "write" else (os, "replace", fail)))
    with pytest.raises(type(error)) as caught:
        save_image(torch.ones(3, 8, 8), path)
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]
    assert path.read_bytes() == before
    assert isinstance(error, KeyboardInterrupt) or str(path) in str(caught.value)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_saved_file_honours_the_umask(umask, mode, tmp_path):
    earlier = os.umask(umask)
    try:
        save_image(torch.zeros(3, 4, 4), tmp_path / "picture.png")
    finally:
        os.umask(earlier)
    assert (tmp_path / "picture.png").stat().st_mode & 0o777 == mode


# ---- folders


def test_images_are_found_in_subfolders_in_order_and_hidden_ones_left_out(tmp_path):
    wanted = ["B.JPG", "a/c.png", "a/deep/d.avif", "z.tiff"]
    for name in [*wanted, "notes.txt", "a/._c.png", ".cache/e.png", "a/png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images(str(tmp_path))
    assert found == sorted(tmp_path / name for name in wanted)
    assert find_images(tmp_path / "a" / "deep") == [tmp_path / "a/deep/d.avif"]


@pytest.mark.parametrize(
    ("kind", "words"), [("nowhere", "no such folder"), ("empty", "no image"), ("a.png", "is no folder")]
)
def test_a_folder_without_images_is_refused_by_name(kind, words, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=words) as caught:
        find_images(tmp_path / kind)
    assert str(tmp_path / kind) in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").touch()
    scandir = os.scandir

    def guarded(path):  # root may list any folder, so permissions cannot make this happen
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(ValueError, match=r"locked: .*Permission denied"):
        find_images(tmp_path)
