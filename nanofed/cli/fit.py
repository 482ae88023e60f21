"""`nanofed fit` and `nanofed validate`."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Train, or measure bits per byte of a checkpoint."""
    from nanofed import api, runtime
    from nanofed.cli.output import show_progress
    from nanofed.training.startup import Startup

    startup = Startup()
    show_progress()
    if argv[0] == "validate":
        bits = api.validate(args=argv[1:])
        if runtime.is_first_rank():
            print(f"{bits:.4f} bits per byte")
        return 0
    summary = api.fit(args=argv[1:], startup=startup)
    if not runtime.is_first_rank():
        return 0
    print(
        f"{summary.name}: {summary.tokens / 1e6:.2f} M tokens in {summary.seconds:.1f} s, "
        f"bits per byte {summary.bpb_start or float('nan'):.4f} -> {summary.bpb_end or float('nan'):.4f}"
    )
    return 0
