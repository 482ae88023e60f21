"""The process of a SuperLink: Flower's own, which hands over no reply before it is whole, and has a store for weights.

Flower's puts every object of every message into SQLite. There they hold up each other and the SuperLink's own book-keeping: with
weights in them, a call found the database locked and the run failed. They are of no use there: after a crash of the SuperLink
its runs are over, and ours goes on from its own checkpoint. So here they are kept in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import sqlite3
import sys
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

import uvicorn

from nanofed.errors import NanofedError
from nanofed.federated.deploy.fleet_rules import FleetRules, Refused, TooMany, bind
from nanofed.federated.deploy.keys import Keys
from nanofed.federated.deploy.nodes import DATABASE, NODES, WEIGHTS
from nanofed.federated.deploy.perimeter import Perimeter, Server
from nanofed.federated.deploy.registration import Registration, read_nodes
from nanofed.federated.wire.weights_server import WeightsServer

logger = logging.getLogger("nanofed.federated.deploy.superlink_process")  # `__main__` as a process

BUSY_SECONDS = 60  # that a call waits for another one's transaction; Flower's is 5


def keep_objects_in_memory(config_loader: Any, sql_mixin: Any) -> None:
    """Change where Flower's SuperLink keeps the objects of messages, and how long it waits for its database.

    Args:
        config_loader: Flower's module of that name.
        sql_mixin: likewise.

    Raises:
        NanofedError: this Flower is another one than was made for.
    """
    if not hasattr(config_loader, "ObjectStoreFactory") or not hasattr(sql_mixin, "SQLITE_PRAGMAS"):
        raise NanofedError("this version of Flower keeps its state in another way: nanofed does not know its SuperLink")
    in_memory = config_loader.ObjectStoreFactory
    config_loader.ObjectStoreFactory = lambda database: in_memory()
    sql_mixin.SQLITE_PRAGMAS = (*sql_mixin.SQLITE_PRAGMAS, ("busy_timeout", str(1000 * BUSY_SECONDS)))


def hold_back_unfinished(linkstate: Any, corestate: Any) -> None:
    """Make Flower's SuperLink hand a reply over when all of it is there.

    Flower's hands it over once it is announced, and whoever asked then waits for what is in it, three minutes for one that was
    cut off. The round loop takes one reply at a time, so one client with a bad link would
    hold up all the others, past the round's end.

    Args:
        linkstate: Flower's module `sql_linkstate`.
        corestate: Flower's module `sql_corestate`.

    Raises:
        NanofedError: this Flower is another one than was made for.
    """
    try:
        reply, node, state = linkstate.MessageResModel, linkstate.NodeModel, linkstate.SqlLinkState
        upload, root = corestate.ObjectPushSessionModel, corestate.ObjectPushSessionRootModel
        whole, lock, now = state.get_message_res, state._lock_run, linkstate.now
    except AttributeError as error:
        raise NanofedError(f"this version of Flower keeps replies in another way: {error}") from error

    def get_message_res(self: Any, message_ids: set[str], run_id: int) -> Any:
        under_way = (
            linkstate.select(reply.reply_to_message_id)
            .join(root, root.root_object_id == reply.message_id)
            .join(upload, upload.session_id == root.session_id)
            .join(node, node.node_id == reply.src_node_id)
            .where(
                reply.reply_to_message_id.in_(message_ids),
                upload.pending_count > 0,
                upload.expires_at > now(),  # Flower gives an upload up in which nothing has come for three minutes
                node.online_until > now().timestamp(),  # of one that is gone, Flower says so
            )
        )
        with self.session() as session:
            lock(self, run_id)  # writes: no reply can be announced between the two looks
            held_back = set(session.scalars(under_way))
            return whole(self, message_ids - held_back, run_id)

    state.get_message_res = get_message_res


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


def refuse(refused: Refused) -> NoReturn:
    """Answer a site's call as Flower's SuperNode understands it: 503, it tries again; 403, the run is over for it."""
    from fastapi import HTTPException

    status = HTTPStatus.SERVICE_UNAVAILABLE if isinstance(refused, TooMany) else HTTPStatus.FORBIDDEN
    raise HTTPException(status, str(refused))


def _named(nodes: Path | None, node: int) -> str:
    """Return the name of a node's site, where it has a key."""
    names = {number: site for site, number in read_nodes(nodes).items()} if nodes is not None else {}
    return f"site {names[node]}" if node in names else f"node {node}"


def main() -> int:
    """Run Flower's SuperLink with its options and our own, and return the exit code."""
    from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
    from flwr.server.superlink.linkstate import sql_linkstate
    from flwr.supercore import sql_mixin
    from flwr.supercore.corestate import sql_corestate
    from flwr.supercore.http_logging import get_uvicorn_log_config
    from flwr.supercore.logger import console_handler
    from flwr.superlink import config_loader
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
    keep_objects_in_memory(config_loader, sql_mixin)
    hold_back_unfinished(sql_linkstate, sql_corestate)
    nodes = own.folder and own.folder / NODES
    bind(fleet_handlers, FleetRules(SUPERLINK_NODE_ID), refuse, functools.partial(_named, nodes))
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
    Server(uvicorn.Config(app, host=config.host, port=config.port, log_config=log), perimeter).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
