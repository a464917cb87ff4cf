"""One fault that is put into the code on purpose; the `mutants_of_*.py` beside this file list them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    name: str
    file: str
    """In latentcodec/."""
    old: str
    new: str
    tests: str
    """What should notice: "test_file.py" or "test_file.py::test_name", several with spaces between. Files are found by
    their names, wherever in tests/ they are."""
