"""What every test shares: one thread, no network, a fixed seed and the photographs where a checkout has them."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Threads sleep while they wait: awake, beside a second process of tests, they took ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1)
if (
    not torch.cuda.is_available()
):  # Triton's kernels are interpreted then, which must be said before it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Fixtures of a module that cost seconds and serve several tests. pytest-xdist shall give those tests to one process
# (--dist loadgroup), or each process would make its own.
COSTLY = (
    "two",
    "finished",
    "peace",
    "refused",
    "folders",
    "inspected",
    "many",
    "trained",
    "browser",
    "begin",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests that share a costly fixture as one group; later hooks come after pytest-xdist has looked."""
    shared = next((name for name in COSTLY if name in getattr(item, "fixturenames", ())), None)
    if shared is not None:
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{shared}"))


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name files and long texts by their argument: bytes may hold a time, and all processes need the same names."""
    return argname if isinstance(val, bytes) or (isinstance(val, str) and len(val) > 60) else None


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, with one thread, whatever the last one took."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos() -> Path:
    """A folder with `train/` and `val/` photographs; tests that need real photographs skip without it."""
    folder = Path(os.environ.get("LATENTCODEC_PHOTOS", Path(__file__).parents[2] / "shared/data/photos"))
    if not folder.is_dir():
        pytest.skip(f"no photographs at {folder}; point LATENTCODEC_PHOTOS at a folder with train/ and val/")
    return folder
