"""Do the tests bite? Break the code in many small ways, one at a time; each must turn at least one test red.

    python tests/mutants.py                 # all of them, in a temporary copy of the repository
    python tests/mutants.py muon noise      # those whose name has one of these words
    python tests/mutants.py --check         # only whether each piece of code to be changed still exists once

Each mutant is a file, a piece of its text, what takes its place, and the tests that should notice; the lists of them
are `mutants_of_*.py`. Those tests are run once on the unchanged copy first: a test that fails there proves nothing.
Ends with "N of M killed" and the names of those that survived; exit code 1 if one did. Ends with code 2 where a piece
of text does not occur exactly once any more: the lists must follow the code. pytest does not collect this script.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from mutant import Mutant
from mutants_of_codecs import CODECS
from mutants_of_losses import LOSSES
from mutants_of_runs import RUNS

ROOT = Path(__file__).parents[1]
COPIED = ("latentcodec", "train", "bench", "examples", "tests", "pyproject.toml", "README.md")
PATIENCE_SECONDS = 900  # for the tests of one mutant; one that hangs is noticed too

PASSED, FAILED = 0, 1  # of pytest's exit codes

MUTANTS = [*LOSSES, *RUNS, *CODECS]


def end(reason: str) -> NoReturn:
    """With code 2."""
    print(reason, file=sys.stderr)
    sys.exit(2)


def find(name: str, root: Path) -> str:
    """test_file.py::test_name -> its path in tests/. Ends with code 2 where there is no such file or test."""
    file, _, test = name.partition("::")
    found = list((root / "tests").rglob(file))
    if len(found) != 1:
        end(f"{len(found)} files called {file} in {root / 'tests'}: mend the list, mutants_of_*.py")
    if f"def {test}" not in found[0].read_text():
        end(f"{file} has no test {test}: mend the list, mutants_of_*.py")
    return str(found[0].relative_to(root)) + (f"::{test}" if test else "")


def check(mutants: list[Mutant]) -> None:
    """End with code 2 where the list no longer fits the code."""
    faults = []
    for mutant in mutants:
        text = (ROOT / "latentcodec" / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            faults.append(f"{mutant.name}: {mutant.file} has {text.count(mutant.old)} times {mutant.old!r}")
        for name in mutant.tests.split():
            find(name, ROOT)
    if faults:
        end("\n".join(faults))


def run(copy: Path, tests: str) -> int:
    """pytest's exit code; a hang counts as a failure, and what is neither passed nor failed ends the program."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    command += [find(name, copy) for name in tests.split()]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ended = subprocess.run(
            command,
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return FAILED
    if ended.returncode not in (PASSED, FAILED):
        print(ended.stdout[-3000:], ended.stderr[-3000:], file=sys.stderr)
        sys.exit(f"pytest {tests} ended with code {ended.returncode}")
    return ended.returncode


def survivors(mutants: list[Mutant], copy: Path) -> list[str]:
    """Apply each mutant to the copy, run its tests, take it back; the names of those that no test has noticed."""
    for tests in dict.fromkeys(mutant.tests for mutant in mutants):
        if run(copy, tests) != PASSED:
            sys.exit(f"{tests} fails without any mutant")
        print(f"passes unchanged: {tests}", flush=True)
    alive = []
    for mutant in mutants:
        file = copy / "latentcodec" / mutant.file
        text, began = file.read_text(), time.monotonic()
        file.write_text(text.replace(mutant.old, mutant.new))
        try:
            noticed = run(copy, mutant.tests) == FAILED
        finally:
            file.write_text(text)
        print(
            f"{'killed' if noticed else 'SURVIVED':8} {time.monotonic() - began:5.1f} s  {mutant.name}",
            flush=True,
        )
        if not noticed:
            alive.append(mutant.name)
    return alive


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only mutants whose name has one of these")
    parser.add_argument("--check", action="store_true", help="run nothing")
    options = parser.parse_args()
    check(MUTANTS)
    chosen = [
        m for m in MUTANTS if not options.words or any(w.lower() in m.name.lower() for w in options.words)
    ]
    if options.check:
        print(f"{len(chosen)} mutants, each of one piece of code that exists")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, folder)
        alive = survivors(chosen, Path(folder))
    print(
        f"{len(chosen) - len(alive)} of {len(chosen)} killed",
        *(f"survived: {name}" for name in alive),
        sep="\n",
    )
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
