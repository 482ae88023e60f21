"""`nanofed server` and `nanofed server init`."""

from __future__ import annotations

import argparse
from typing import Annotated

from nanofed import runtime
from nanofed.cli.numbers import add_number
from nanofed.ranges import Range

USAGE = """nanofed server --config FILE [--listen HOST:PORT] [--keys KEYS] [--plan FILE] [options of nanofed federate]
       nanofed server init KEYS --host HOST [--host …] --site NAME [--site …]"""


def main(argv: list[str]) -> int:
    """Serve a federation of sites, or write the keys that it needs."""
    if argv[1:2] == ["init"]:
        return _init(argv[2:])
    own, rest = _parser().parse_known_args(argv[1:])
    from nanofed import api
    from nanofed.cli.output import describe, show_progress

    show_progress()
    if own.plan is not None:
        print(api.plan(own.plan, args=rest, serving=True).text(), flush=True)
    print(describe(api.serve(args=rest, listen=own.listen, keys=own.keys)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanofed server",
        usage=USAGE,
        description="Serve a federation of sites until its end: start Flower's SuperLink, run the rounds, go on after crashes.",
        epilog="Everything else is an option of nanofed federate (nanofed federate --help). Started again with the same "
        "arguments, it goes on from the last committed round.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--listen", default="127.0.0.1:9092", help="where sites reach the server (default: %(default)s)"
    )
    parser.add_argument("--keys", help="folder of nanofed server init: TLS, and a key for each site")
    parser.add_argument("--plan", metavar="FILE", help="first say what rounds will come to at the sites of a file")
    return parser


def _init(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="nanofed server init",
        description="Write a certificate authority, the server's certificate, and a key pair for each site.",
        allow_abbrev=False,
    )
    parser.add_argument("keys", metavar="KEYS", type=runtime.user_path, help="folder; what is there already stays")
    parser.add_argument("--host", action="append", default=[], help="name or address by which sites call the server")
    parser.add_argument("--site", action="append", default=[], help="name of a site")
    port, days = Annotated[int, Range(1, 65535)], Annotated[int, Range(1, 36_500)]
    add_number(parser, "--port", kind=port, default=9092, help="of the server, for the commands printed")
    add_number(parser, "--days", kind=days, default=365, help="validity of the server's certificate")
    parser.add_argument(
        "--force",
        action="store_true",
        help="issue these sites' keys anew, and with --host or without --site the server's certificate; a running server goes on",
    )
    options = parser.parse_args(argv)
    from nanofed.federated.deploy.keys import init

    keys = init(options.keys, options.host, options.site, days=options.days, force=options.force)
    host = keys.hosts()[0]
    listen = f"{'127.0.0.1' if host in ('localhost', '127.0.0.1') else '0.0.0.0'}:{options.port}"
    print(f"wrote {len(keys.created)} files to {keys.folder}; private keys are readable by you alone")
    print(f"\nhere:\n  nanofed server --config CONFIG --listen {listen} --keys {keys.folder}")
    for name in keys.names():
        print(f"\nat {name}, with {keys.handout(name)} copied there by a safe way:")
        print(f"  nanofed site --config CONFIG --superlink {host}:{options.port} --name {name} --keys {name}")
    return 0
