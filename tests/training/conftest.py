"""What the tests of training share: a folder of small images."""

import pytest
from small_runs import write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of twelve small pictures that a codec can learn something of."""
    return write_images(tmp_path_factory.mktemp("data") / "images")
