"""`nanofed compare`: runs beside each other, at equal tokens, seconds and bytes."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    """Print the table of a comparison, and write its page or picture where that is asked for."""
    parser = argparse.ArgumentParser(
        "nanofed compare",
        description="Bits per byte of runs at equal tokens, seconds and bytes sent, and in what their options differ.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder; the others are held to the first"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="a page (.html) or a picture (.png) to write as well"
    )
    args = parser.parse_args(argv[1:])

    from nanofed import runtime
    from nanofed.training.comparison import Comparison

    comparison = Comparison([runtime.user_path(str(run)) for run in args.runs])
    if args.output is not None:
        comparison.write(runtime.user_path(str(args.output)))
    print(comparison.text())
    return 0
