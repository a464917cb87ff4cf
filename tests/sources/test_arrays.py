"""Idx and npz files: the images and labels that were written, and mistakes that name the file."""

import gzip
import io
import struct
import zipfile

import numpy as np
import pytest
import torch

from latentcodec.pixels import decode_image, encode_image, from_uint8
from latentcodec.sources.images import Place, open_source

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (12, 9, 7), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (12, 9, 7, 3), dtype=np.uint8)
CLEAR = RANDOM.integers(0, 256, (12, 9, 7, 4), dtype=np.uint8)  # partly transparent colours
LABELS = np.arange(12, dtype=np.uint8) % 3


def idx(array):
    """The bytes of an idx file, by the description on MNIST's page."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    return header + array.tobytes()


def write_mnist(folder):
    """The four files of MNIST: half of them compressed, as people have them."""
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(idx(GREY))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(GREY[:4])))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS[:4]))
    return folder


def test_a_folder_of_idx_files_gives_the_split_that_was_asked_for_with_labels(tmp_path):
    folder = write_mnist(tmp_path / "mnist")
    train = open_source(Place(str(folder)), channels=1)
    test = open_source(Place(str(folder), split="test"), channels=1)
    assert (len(train), len(test), train.size(3)) == (12, 4, (9, 7))
    for number in range(12):
        assert torch.equal(train.read(number), from_uint8(torch.from_numpy(GREY[number]))[None])
    assert train.labels.numbers.tolist() == LABELS.tolist()
    assert test.labels.name(2) == "2"
    alone = open_source(Place(str(folder / "t10k-images-idx3-ubyte.gz")), channels=1)
    assert torch.equal(alone.read(1), test.read(1))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("pixels", [GREY, GREY[..., None], COLOUR, CLEAR])
def test_arrays_become_other_channels_as_image_files_do(tmp_path, channels, pixels):
    np.savez(tmp_path / "set.npz", images=pixels)
    source = open_source(Place(str(tmp_path / "set.npz")), channels=channels)
    sides = (2, 0, 1) if pixels.ndim == 4 else (0, 1)
    picture = torch.from_numpy(pixels[5].transpose(sides))
    png = encode_image(picture if picture.ndim == 3 else picture[None], tmp_path / "x.png")
    assert torch.equal(source.read(5), decode_image(png, channels, name="x"))


@pytest.mark.parametrize(
    ("names", "columns", "split"),
    [
        (("x_train", "y_train"), (None, None), "train"),
        (("images", "labels"), (None, None), "train"),
        (("x_test", "y_test"), (None, None), "test"),
        (("pictures", "kinds"), ("pictures", "kinds"), "train"),
        (("whatever", "y"), (None, None), "train"),
    ],
)
def test_arrays_of_npz_files_are_found_by_their_names(tmp_path, names, columns, split):
    np.savez(tmp_path / "set.npz", **dict(zip(names, (COLOUR, LABELS), strict=True)))
    source = open_source(Place(str(tmp_path / "set.npz"), split=split), columns[0], 3, columns[1])
    assert len(source) == 12
    assert source.labels.numbers.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK", "not an idx file"),
        (bytes([0, 0, 13, 3]) + bytes(12), "values of type 13"),
        (idx(GREY)[:-1], "755 values, and its header says 12 x 9 x 7"),
        (idx(LABELS), "give the file of images"),
    ],
)
def test_a_bad_idx_file_is_named_with_what_is_wrong(tmp_path, content, said):
    path = tmp_path / "a-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a-images-idx3-ubyte: .*{said}"):
        open_source(Place(str(path)), channels=1)


def test_labels_that_do_not_fit_and_arrays_that_are_not_there_are_refused(tmp_path):
    folder = write_mnist(tmp_path / "mnist")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS))
    with pytest.raises(ValueError, match="labels for 4 images"):
        open_source(Place(str(folder), split="test"), channels=1)
    with pytest.raises(ValueError, match=r"data\.split 'val'"):
        open_source(Place(str(folder), split="val"), channels=1)
    with pytest.raises(ValueError, match=r"data\.label_column"):
        open_source(Place(str(folder)), channels=1, label_column="y")
    np.savez(tmp_path / "two.npz", a=GREY, b=GREY)
    with pytest.raises(ValueError, match=r"data\.image_column: a \[12, 9, 7\] uint8"):
        open_source(Place(str(tmp_path / "two.npz")), channels=1)
    with pytest.raises(ValueError, match=r"no 'c' \(data\.image_column\)"):
        open_source(Place(str(tmp_path / "two.npz")), "c", 1)
    np.savez(tmp_path / "floats.npz", images=GREY / 255)
    with pytest.raises(ValueError, match="images are bytes"):
        open_source(Place(str(tmp_path / "floats.npz")), channels=1)
    (tmp_path / "no.npz").write_bytes(b"?")
    with pytest.raises(ValueError, match="not an npz file"):
        open_source(Place(str(tmp_path / "no.npz")), channels=1)


def header_of(shape):
    """The beginning of an npy file of bytes that says this shape."""
    said = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(said)) + said.encode()


def archive(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr(name, content)
    return file.getvalue()


BROKEN_NPZ = {
    "empty": b"",
    "a shape beyond memory": archive("x.npy", header_of("(100000000000, 9, 7)")),
    "a shape beyond 64 bits": archive("x.npy", header_of("(9999999999999999999999, 9, 7)")),
    "no array": archive("readme.txt", b"hello"),
    "an unknown way of packing": archive("x.npy", header_of("(1, 9, 7)")).replace(b"\x08\0", b"\x63\0"),
    "a password": archive("x.npy", header_of("(1, 9, 7)")).replace(b"\x14\0\0\0", b"\x14\0\1\0"),
}


@pytest.mark.parametrize("kind", BROKEN_NPZ)
def test_a_broken_npz_file_is_named(tmp_path, kind):
    (tmp_path / "set.npz").write_bytes(BROKEN_NPZ[kind])
    with pytest.raises(ValueError, match=r"set\.npz: "):
        open_source(Place(str(tmp_path / "set.npz")), channels=1)


def test_a_gzip_file_that_cannot_be_unpacked_is_named(tmp_path):
    packed = bytearray(gzip.compress(idx(GREY)))
    packed[10] |= 7  # a kind of block that there is not
    (tmp_path / "a-images-idx3-ubyte.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=r"a-images-idx3-ubyte\.gz: not a whole gzip file"):
        open_source(Place(str(tmp_path / "a-images-idx3-ubyte.gz")), channels=1)
