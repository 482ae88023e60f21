"""`nanofed federate`."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Train across clients."""
    from nanofed import api
    from nanofed.cli.output import describe, show_progress

    show_progress()
    print(describe(api.federate(args=argv[1:])))
    return 0
