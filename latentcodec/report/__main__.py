"""Make the page of a result again: `python -m latentcodec.report RESULT.json [...] [--out FOLDER]`.

The page has the name of its result; an older page of that name is replaced, the result itself stays as it is. With
--card it prints a section for a model card instead, and with --evaluation the block of metadata that the hub reads.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from latentcodec.report.build import write_page
from latentcodec.report.cards import card_section, evaluation_block
from latentcodec.report.results import read_json


def main(argv: Sequence[str] | None = None) -> None:
    """Raises SystemExit with 2 and one line where a file is no result."""
    parser = argparse.ArgumentParser(
        prog="python -m latentcodec.report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of bench/ or `latentcodec inspect`")
    parser.add_argument("--out", type=Path, help="folder of the pages; default: beside the results")
    parser.add_argument("--card", action="store_true", help="print Markdown for a model card")
    parser.add_argument(
        "--evaluation", action="store_true", help="print the YAML of a Hugging Face evaluation"
    )
    options = parser.parse_args(argv)
    try:
        for path in options.results:
            print(_made(path, options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _made(path: Path, options: argparse.Namespace) -> str:
    """The section or the block that was asked for, or where the page of a result is now."""
    data = read_json(path)
    try:
        if options.card or options.evaluation:
            return (card_section if options.card else evaluation_block)(data)
        return str(write_page(data, options.out or path.parent, path.stem))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path}: a result of another version of its bench, or edited since ({error!r}): measure again"
        ) from error


if __name__ == "__main__":
    main()
