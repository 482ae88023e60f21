"""`nanofed fit` and `nanofed validate`."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Train, or measure bits per byte of a checkpoint."""
    from nanofed import api, runtime
    from nanofed.cli.output import describe, show_progress
    from nanofed.training.startup import Startup

    startup = Startup()
    show_progress()
    if argv[0] == "validate":
        bits = api.validate(args=argv[1:])
        if runtime.is_first_rank():
            print(f"{bits:.4f} bits per byte")
        return 0
    summary = api.fit(args=argv[1:], startup=startup)
    if runtime.is_first_rank():
        print(describe(summary))
    return 0
