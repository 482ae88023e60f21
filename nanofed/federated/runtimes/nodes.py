"""Which node is whose: the supervisor of a SuperLink writes it down when it registers keys, the round loop reads it."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = "server"  # of the run's folder: Flower's home and database, the log, the depot, and this
NODES = "nodes.json"
DEPOT = "depot"


def read_nodes(folder: Path) -> dict[str, dict[str, str]]:
    """Return what is known of each site: `node`, its id, and `key`, a hash of the key that it was registered with."""
    try:
        nodes: dict[str, dict[str, str]] = json.loads((folder / NODES).read_text())
    except (OSError, ValueError):
        return {}
    return nodes


def owners(run: Path) -> dict[int, str]:
    """Return node -> the site whose key it has."""
    return {int(entry["node"]): name for name, entry in read_nodes(run / FOLDER).items()}
