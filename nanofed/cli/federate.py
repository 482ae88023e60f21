"""`nanofed federate`, and `nanofed federate --plan`."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Train across clients, or say what a federation of given sites would come to."""
    own, rest = _parser().parse_known_args(argv[1:])
    from nanofed import api, streams
    from nanofed.cli.output import describe, show_progress

    show_progress()
    if own.plan is not None:
        streams.secure(lasting=False)  # it is run for what it prints
        print(api.plan(own.plan, args=rest).text())
    else:
        print(describe(api.federate(args=rest)))
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of what is no option of the federation."""
    parser = argparse.ArgumentParser(prog="nanofed federate", add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", metavar="FILE")
    return parser
