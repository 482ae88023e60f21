"""`nanofed site` with a worker that trains nothing: the same supervisor and SuperNode.

python -m tests.benchmarks.echo_site --superlink HOST:PORT --name N --state FOLDER [--keys FOLDER] ARGUMENTS OF FEDERATE
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace

from nanofed.federated.deploy.site import run_site
from nanofed.federated.site.options import site_options

WORKER = "tests.benchmarks.echo_rounds"


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("superlink", "name", "state", "keys"):
        parser.add_argument(f"--{name}", required=name != "keys")
    own, rest = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO)
    options = site_options(own.superlink, own.name, keys=own.keys, state=own.state)
    run_site(replace(options, worker=WORKER), rest)


if __name__ == "__main__":
    main()
