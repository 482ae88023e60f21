"""`python -m nanofed`: what torchrun launches."""

from nanofed.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
