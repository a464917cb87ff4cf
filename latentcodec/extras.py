"""Optional packages, and which extra of this package installs each."""

import sys
from importlib.util import find_spec
from types import TracebackType


class MissingPackage(ModuleNotFoundError):
    """An optional package that is not installed; says what to install. Where nobody catches it, it is one line."""


def require(extra: str, *packages: str) -> None:
    """Raises MissingPackage, in one line that says what to install, unless all `packages` can be imported."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        _end_in_one_line()
        raise MissingPackage(
            f"{', '.join(missing)}: not installed; pip install 'latentcodec[{extra}]' brings what is missing",
            name=missing[0],
        )


def require_docstrings() -> None:
    """Raises MissingPackage under `python -OO`, where transformers, which diffusers imports, ends in a traceback."""
    if sys.flags.optimize > 1 and find_spec("transformers") is not None:
        _end_in_one_line()
        raise MissingPackage(
            "python -OO (PYTHONOPTIMIZE=2) drops the docstrings that transformers reads: use -O, or neither"
        )


def _end_in_one_line() -> None:
    """Scripts import at their top, where they catch nothing: without this, they would end in a page of traceback."""
    before = sys.excepthook

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, MissingPackage):
            print(f"error: {error}", file=sys.stderr)
        else:
            before(kind, error, trace)

    sys.excepthook = say
