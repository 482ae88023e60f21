"""`nanofed federate`."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Train across clients."""
    from nanofed import api
    from nanofed.cli.output import show_progress

    show_progress()
    summary = api.federate(args=argv[1:])
    print(
        f"{summary.name}: {summary.tokens / 1e6:.2f} M tokens in {summary.seconds:.1f} s, "
        f"bits per byte {summary.bpb_start or float('nan'):.4f} -> {summary.bpb_end or float('nan'):.4f}"
    )
    return 0
