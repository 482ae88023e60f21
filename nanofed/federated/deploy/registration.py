"""The nodes of Flower's SuperLink follow the folder of the sites' keys, in the SuperLink's own process."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

from nanofed.federated.deploy.admission import LOG_SECONDS, Throttle
from nanofed.federated.deploy.keys import read_sites
from nanofed.files import write_atomically

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
HEARTBEAT_SECONDS = 30.0  # what Flower registers a node with, until it says its own


class Registration:
    """Registers a node for each site's key, unregisters the nodes of keys that are gone, and writes down which node is whose.

    A key is a node's identity: a site whose key is renewed gets another node, and the old key's node is unregistered, after which
    Flower refuses its calls. What the SuperLink's database holds counts, not what the file says: either may have been lost.

    Args:
        state: Flower's LinkState.
        linkstate: Flower's module of it.
        owner: Flower's account under which nodes are registered: its id and its name.
        sites: folder of `NAME.pub` files.
        file: to which the node id of each site is written, as JSON.
    """

    def __init__(self, state: Any, linkstate: Any, owner: tuple[str, str], sites: Path, file: Path) -> None:
        self._state = state
        self._linkstate = linkstate
        self._owner = owner
        self._sites = sites
        self._file = file
        self._keys: dict[bytes, str] | None = None
        self._nodes: dict[str, int] = {}

    def update(self) -> None:
        """Look at the folder, and make the nodes and the file fit.

        Raises:
            OSError: the file cannot be written.
        """
        keys, _ = read_sites(self._sites)
        if keys != self._keys:
            nodes = self._state.get_node_info(owner_aids=[self._owner[0]])
            found = {node.public_key: self._state.get_node_id_by_public_key(node.public_key) for node in nodes}
            known = {public: int(node) for public, node in found.items() if node is not None}  # None: unregistered
            for public in known.keys() - keys.keys():
                self._state.delete_node(self._owner[0], known[public])
            for public in keys.keys() - known.keys():
                self._forget(public)
                known[public] = self._state.create_node(*self._owner, public, HEARTBEAT_SECONDS)
            self._nodes = {name: known[public] for public, name in keys.items()}
            self._keys = keys
        if read_nodes(self._file) != self._nodes:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(self._nodes))

    def _forget(self, public: bytes) -> None:
        """Remove a key's node that was unregistered: Flower registers no key a second time, and this one is back."""
        node = self._linkstate.NodeModel
        with self._state.session() as session:
            session.execute(self._linkstate.delete(node).where(node.public_key == public))

    def keep_up(self) -> None:
        """Update once, and then every second in a thread of its own, through errors, each of which is said once a minute."""
        self.update()
        threading.Thread(target=self._follow, name="nanofed-registration", daemon=True).start()

    def _follow(self) -> None:
        lines = Throttle(LOG_SECONDS)
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                self.update()
            except Exception as error:  # a database that is busy, a disk that is full: there is another look
                if lines.due(str(error)):
                    logger.error("the registration of sites cannot be brought up to date: %s", error)


def read_nodes(file: Path) -> dict[str, int]:
    """Return the node id of each site as `Registration` wrote it; nothing where that is missing or damaged."""
    try:
        nodes = json.loads(file.read_bytes())
        return {str(name): int(node) for name, node in nodes.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def read_owners(file: Path) -> dict[int, str]:
    """Return the site of each node id, as `read_nodes` finds them."""
    return {node: site for site, node in read_nodes(file).items()}
