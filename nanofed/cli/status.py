"""`nanofed status RUN`: how far a federated run is, who is here, what was refused and why."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from nanofed import runtime


def main(argv: list[str]) -> int | None:
    """Print the status of a run; the run is only read, whether its server runs or not."""
    parser = argparse.ArgumentParser(prog=f"nanofed {argv[0]}", description="Show how far a federated run is.")
    parser.add_argument("run", type=runtime.user_path, help="the run's folder, such as runs/tiny_federated")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(argv[1:])

    from nanofed.federated.server.status import as_text, read_status

    status = read_status(options.run)
    print(json.dumps(asdict(status), indent=1) if options.json else as_text(status))
    return 0
