"""`nanofed profile`: where the time of a training step goes."""

from __future__ import annotations

import argparse

from nanofed.cli.numbers import add_number
from nanofed.ranges import Count


def main(argv: list[str]) -> int:
    """Print phases, operators and speed of a step of `nanofed fit`, and write a trace of it."""
    own, rest = _parser().parse_known_args(argv[1:])
    from nanofed import api
    from nanofed.cli.output import show_progress

    show_progress()
    found = api.profile(args=rest, trace=own.output, warm_up=own.warm_up, steps=own.steps)
    if found is not None:
        print(found.text())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "nanofed profile",
        usage="nanofed profile --config CONFIG [--warm_up N] [--steps N] [--output FILE] [options of nanofed fit]",
        description="Take a few steps of nanofed fit and say where their time goes: phases, operators, tokens a second, and the "
        "share of what matmuls alone reach on this machine. Steps are timed first and traced afterwards, since tracing slows "
        "them. Nothing that is trained is kept, and no run is touched.",
        allow_abbrev=False,
    )
    add_number(
        parser, "--warm_up", kind=Count, default=3, metavar="N", help="steps before those that count (%(default)s)"
    )
    add_number(
        parser, "--steps", kind=Count, default=5, metavar="N", help="steps to time, and as many to trace (%(default)s)"
    )
    parser.add_argument(
        "--output",
        default="trace.json.gz",
        metavar="FILE",
        help="the trace, for https://ui.perfetto.dev or chrome://tracing (%(default)s, which is written anew)",
    )
    return parser
