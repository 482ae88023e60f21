"""The process of a SuperLink: Flower's own, which keeps weights in memory and only the rest in its database.

Flower's puts every chunk of every message into SQLite. There they hold up each other and the SuperLink's own book-keeping, until
a call finds the database locked and the run fails (`bin/bench round --depth 12` on a busy machine). They are of no use there:
after a crash of the SuperLink its runs are over, and ours goes on from its own checkpoint.
"""

from __future__ import annotations

import sys
from typing import Any

from nanofed.errors import NanofedError
from nanofed.federated.whole_bodies import receive_whole_bodies

BUSY_SECONDS = 60  # that a call waits for another one's transaction; Flower's is 5


def keep_weights_in_memory(config_loader: Any, sql_mixin: Any) -> None:
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


def main() -> None:
    """Run `flower-superlink` with the same arguments."""
    from flwr.supercore import sql_mixin
    from flwr.superlink import config_loader
    from flwr.superlink import main as application
    from flwr.superlink.cli import flower_superlink

    keep_weights_in_memory(config_loader, sql_mixin)
    receive_whole_bodies(application)
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()
