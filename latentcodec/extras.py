"""Optional packages, and which extra of this package installs each."""

from importlib.util import find_spec


def require(extra: str, *packages: str) -> None:
    """Raises ModuleNotFoundError, in one line that says what to install, unless all `packages` can be imported."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)}: not installed; pip install 'latentcodec[{extra}]' brings what is missing",
            name=missing[0],
        )
