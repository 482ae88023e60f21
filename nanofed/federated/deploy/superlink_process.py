"""The process of a SuperLink: Flower's application, with the weights' calls, on loopback and behind a perimeter.

Without keys it is served on loopback only. Each site's calls pass `fleet_rules.py`; its nodes follow the folder of keys.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import resource
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path

import uvicorn

from nanofed.errors import NanofedError
from nanofed.federated.deploy.fleet_rules import FleetRules, bind
from nanofed.federated.deploy.keys import Keys
from nanofed.federated.deploy.perimeter import Perimeter, Server
from nanofed.federated.deploy.registration import Registration, read_owners
from nanofed.federated.deploy.superlink import DATABASE, NODES, WEIGHTS
from nanofed.federated.flower_patches import hold_back_unfinished
from nanofed.federated.wire.weights_server import WeightsServer

logger = logging.getLogger("nanofed.federated.deploy.superlink_process")  # `__main__` as a process


def set_aside_damaged(database: Path) -> bool:
    """Rename a database that cannot be read, so that the SuperLink begins with a new one; returns whether it did.

    Nothing in it is needed: runs are over after a restart, and nodes are registered anew from the sites' keys. A journal that
    was left behind by a database that is gone is removed, since it would be read into the new one.

    Args:
        database: of SQLite; may be missing.
    """
    journals = [database.with_name(database.name + end) for end in ("-wal", "-shm", "-journal")]
    damage = ""
    if database.exists():
        try:
            with contextlib.closing(sqlite3.connect(database)) as connection:
                (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                damage = "" if found == "ok" else found
        except sqlite3.OperationalError:  # locked, or no disk: Flower says so
            return False
        except sqlite3.DatabaseError as error:
            damage = str(error)
        if not damage:
            return False
        aside = database.with_name(f"{database.name}.damaged")
        logger.warning("%s is damaged (%s): it is put aside as %s, and begun anew", database, damage, aside.name)
        database.replace(aside)
    for journal in journals:
        journal.unlink(missing_ok=True)
    return bool(damage)


def _named(nodes: Path | None, node: int) -> str:
    """Return the name of a node's site, where it has a key."""
    sites = {} if nodes is None else read_owners(nodes)
    return f"site {sites[node]}" if node in sites else f"node {node}"


def main() -> int:
    """Run Flower's SuperLink with its options and our own, and return the exit code."""
    from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
    from flwr.server.superlink.linkstate import sql_linkstate
    from flwr.supercore.corestate import sql_corestate
    from flwr.supercore.http_logging import get_uvicorn_log_config
    from flwr.supercore.logger import console_handler
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
    from flwr.superlink.main import create_app
    from flwr.superlink.servicer.fleet import fleet_handlers

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    logging.getLogger("nanofed").addHandler(handler)  # not the root: Flower's own loggers would speak twice
    logging.getLogger("nanofed").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--folder", type=Path, help="for weights, database, nodes and counters; none for a simulation")
    parser.add_argument("--keys", type=Path, help="of the federation: then sites come to --listen, by TLS")
    parser.add_argument("--listen", nargs=2, metavar=("HOST", "PORT"), help="that faces the network")
    own, rest = parser.parse_known_args()
    with contextlib.suppress(ValueError, OSError):  # as many connections as the system allows: each holds a file handle
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    hold_back_unfinished(sql_linkstate, sql_corestate)
    nodes = own.folder and own.folder / NODES
    bind(fleet_handlers, FleetRules(SUPERLINK_NODE_ID), functools.partial(_named, nodes))
    if own.folder is not None:
        set_aside_damaged(own.folder / DATABASE)
        rest += ["--database", str(own.folder / DATABASE)]
    sys.argv = ["flower-superlink", "--insecure", *rest]
    config = replace(_parse_superlink_lifespan_config(), enable_supernode_auth=own.keys is not None)
    app = create_app(config, SuperLinkLifespan)
    if own.folder is not None:
        app.add_middleware(WeightsServer, folder=own.folder / WEIGHTS)  # the last added is the outermost
    try:
        perimeter = None
        if own.keys is not None:
            keys, state = Keys(own.keys), app.state.linkstate_factory.state()
            perimeter = Perimeter(app, (own.listen[0], int(own.listen[1])), keys, own.folder)
            Registration(state, sql_linkstate, (NOOP_FLWR_AID, NOOP_ACCOUNT_NAME), keys.sites, nodes).keep_up()
    except NanofedError as error:
        logger.error("exit %d: %s", error.exit_code, error)
        return error.exit_code
    log = get_uvicorn_log_config(console_handler.level)
    own_config = uvicorn.Config(app, host=config.host, port=config.port, server_header=False, log_config=log)
    Server(own_config, perimeter).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
