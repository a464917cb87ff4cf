"""What the tests of stores share: a codec, pictures and stores to read; for the command, files and a call."""

import pytest
from stores import make_and_open, tiny_codec, write_pictures

from latentcodec.cli import run


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("reading") / "photos", 11, captions=True)


@pytest.fixture(scope="module")
def store(photos, codec):
    return make_and_open(photos, photos.parent / "store", codec)


@pytest.fixture(scope="module")
def drawn(photos, codec):
    """Of means and deviations, mirrored too."""
    return make_and_open(photos, photos.parent / "drawn", codec, posterior="mean and std", mirrored=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a codec and photographs."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_codec().save_pretrained(folder / "codec")
    write_pictures(folder / "photos", 5, captions=True)
    return folder


@pytest.fixture
def call(capsys):
    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call
