"""What the tests of stores share: a codec, pictures, and stores of them for the tests that only read."""

import pytest
from stores import make_and_open, tiny_codec, write_pictures


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
