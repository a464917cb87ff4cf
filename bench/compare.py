"""Two results of one bench against each other: what is better, what is worse, and what is noise.

    python bench/compare.py BEFORE.json AFTER.json [--out FOLDER]

Prints every number that both hold, with the signed difference and the noise, and with --out writes a page and its
JSON. Exit code 3 where a number is worse beyond the noise, else 0; 2 where the files cannot be compared.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from latentcodec.report import results as report
from latentcodec.report.build import write_result
from latentcodec.report.comparison import compare
from latentcodec.report.pages.comparison import table

WRONG, LOOK = 2, 3  # exit codes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="a result of bench/ or of `latentcodec inspect`")
    parser.add_argument("after", type=Path, help="another one of the same bench")
    parser.add_argument("--out", type=Path, help="folder for a page and its JSON; default: none")
    options = parser.parse_args(argv)
    try:
        data = compare(report.read_json(options.before), report.read_json(options.after))
        data["files"] = [report.short_path(str(path)) for path in (options.before, options.after)]
        report.print_table(*table(data))
        for key in data["differs"]:
            before, after = (origin[key] for origin in data["origins"])
            print(f"not the same: {key}: {before or '-'} and {after or '-'}")
        if options.out is not None:
            name = f"{options.before.stem}_and_{options.after.stem}_compare"
            print("\n".join(write_result(data, options.out, name).values()))
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return WRONG
    print(f"{data['regressions']} worse, {data['improvements']} better, of {len(data['changes'])} numbers")
    return LOOK if data["regressions"] else 0


if __name__ == "__main__":
    sys.exit(main())
