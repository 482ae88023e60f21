"""`nanofed site`."""

from __future__ import annotations

import argparse
from typing import Annotated

from nanofed.cli.numbers import add_number
from nanofed.ranges import Range

USAGE = "nanofed site --config FILE --superlink HOST:PORT --name NAME [--keys FOLDER] [--devices N] [options of nanofed federate]"


def main(argv: list[str]) -> int:
    """Take part in a federation with this machine until told to stop."""
    own, rest = _parser().parse_known_args(argv[1:])
    from nanofed import api
    from nanofed.cli.output import show_progress

    show_progress(lightning=False)  # its worker does
    api.join(args=rest, superlink=own.superlink, name=own.name, keys=own.keys, devices=own.devices, state=own.state)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanofed site",
        usage=USAGE,
        description="Take part in a federation with this machine's devices, until stopped with Ctrl-C or SIGTERM.",
        epilog="Everything else is an option of nanofed federate (nanofed federate --help): model and data as at the server.",
        allow_abbrev=False,
    )
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT", help="where the server is")
    parser.add_argument("--name", required=True, help="of this site, the same as long as it takes part")
    parser.add_argument("--keys", help="the folder handed out by nanofed server init: ca.pem and site.key")
    devices = Annotated[int, Range(1, 1024)]
    add_number(parser, "--devices", kind=devices, default=1, help="devices of this machine that train together")
    parser.add_argument("--state", help="folder for what the site keeps (default: sites/NAME in the cache folder)")
    return parser
