"""What the tests of a run's start share: a folder of small images."""

import pytest
from small_runs import write_images


@pytest.fixture
def images(tmp_path):
    """A folder of twelve pictures as small as the crops."""
    return write_images(tmp_path / "images", side=32)
