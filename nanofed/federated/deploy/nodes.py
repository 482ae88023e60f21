"""Where a server keeps what is beside its checkpoints, and which node is whose."""

from __future__ import annotations

from pathlib import Path

from nanofed.federated.deploy.registration import read_nodes

FOLDER = "server"  # of the run's folder: Flower's home and database, the log, the store, and this
NODES = "nodes.json"
WEIGHTS = "weights"
DATABASE = "superlink.db"


def owners(run: Path) -> dict[int, str]:
    """Return node -> the site whose key it has, as the SuperLink's process has written it down."""
    return {node: name for name, node in read_nodes(run / FOLDER / NODES).items()}
