"""`python -m nanofed.federated.deploy.proxy`: the proxy as a process of its own; it starts without torch."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from nanofed.errors import NanofedError
from nanofed.federated.deploy.proxy.guard import Limits
from nanofed.federated.deploy.proxy.service import Options, serve

logger = logging.getLogger("nanofed.federated.deploy.proxy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the proxy to its end and return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s proxy %(levelname)s: %(message)s")
    try:
        serve(_options(arguments))
    except NanofedError as error:
        logger.error("%s", error)
        return error.exit_code
    return 0


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m nanofed.federated.deploy.proxy", description="nanofed's TLS proxy")
    parser.add_argument("--listen", required=True, help="host:port that faces the network")
    parser.add_argument("--upstream", required=True, help="host:port of the SuperLink, on loopback")
    parser.add_argument("--certificate", required=True, type=Path, help="of the server")
    parser.add_argument("--key", required=True, type=Path, help="of the certificate")
    parser.add_argument("--sites", required=True, type=Path, help="folder of the sites' public keys, NAME.pub")
    parser.add_argument("--upstream_ca", type=Path, help="the authority of the SuperLink's certificate")
    parser.add_argument("--status", type=Path, help="file for the counters")
    parser.add_argument("--known", type=Path, help="file in which the addresses of sites are kept")
    parser.add_argument("--parent", type=int, help="end when this is no longer the parent process")
    parser.add_argument("--tick", type=float, default=1.0, help="seconds between two looks at files and parent")
    for limit in fields(Limits):
        kind = {"int": int, "float": float}[str(limit.type)]
        parser.add_argument(f"--{limit.name}", type=kind, default=limit.default)
    given = vars(parser.parse_args(arguments))
    limits = Limits(**{limit.name: given.pop(limit.name) for limit in fields(Limits)})
    return Options(**given, limits=limits)


if __name__ == "__main__":
    sys.exit(main())
