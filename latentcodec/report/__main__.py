"""Make the page of a result again: `python -m latentcodec.report RESULT.json [...] [--out FOLDER]`.

The page has the name of its result; an older page of that name is replaced, the result itself stays as it is.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from latentcodec.files import write_whole
from latentcodec.report.build import build_page
from latentcodec.report.results import read_json


def main(argv: Sequence[str] | None = None) -> None:
    """Raises SystemExit with 2 and one line where a file is no result."""
    parser = argparse.ArgumentParser(prog="python -m latentcodec.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of bench/ or `latentcodec inspect`")
    parser.add_argument("--out", type=Path, help="folder of the pages; default: beside the results")
    options = parser.parse_args(argv)
    try:
        for path in options.results:
            target = (options.out or path.parent) / f"{path.stem}.html"
            write_whole(target, build_page(read_json(path)).render().encode())
            print(target)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
