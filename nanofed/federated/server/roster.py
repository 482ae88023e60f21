"""Who is who: clients by name, checked before their first round."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import fields

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from nanofed.federated.wire.codec import WireError
from nanofed.federated.wire.messages import Hello

logger = logging.getLogger(__name__)

OWN = ("name", "versions", "devices", "tokens_per_second", "shards")  # may differ from the server's
HELLO_SECONDS = 120.0  # a fresh Ray actor imports torch before it answers
ASK_AGAIN_SECONDS = 600.0  # a node that was refused or silent must not hold up every round


class Roster:
    """Flower's node ids and the clients behind them.

    Args:
        grid: the connection to the nodes.
        expected: what every client must say of itself, but for its name.
    """

    def __init__(self, grid: Grid, expected: Hello) -> None:
        self._grid = grid
        self._expected = expected
        self._names: dict[int, str] = {}
        self._asked: dict[int, float] = {}  # node -> when it was last asked
        self.refused: dict[str, str] = {}  # client (or node) -> why

    def connected(self) -> dict[str, int]:
        """Return client name -> node id of those connected now; new nodes are asked who they are first."""
        nodes = set(self._grid.get_node_ids())
        self._names = {node: name for node, name in self._names.items() if node in nodes}
        now = time.monotonic()
        due = {node for node in nodes if now - self._asked.get(node, -ASK_AGAIN_SECONDS) >= ASK_AGAIN_SECONDS}
        new = sorted(due - self._names.keys())
        self._asked = {node: now if node in new else self._asked.get(node, now) for node in nodes}
        for node, name in self._ask(new).items():
            if name in self._names.values():
                self._refuse(name, f"another node ({node}) already goes by that name")
            else:
                self._names[node] = name
        return {name: node for node, name in sorted(self._names.items(), key=lambda item: item[1])}

    def _ask(self, nodes: Iterable[int]) -> dict[int, str]:
        content = RecordDict({"getpropertiesins.config": ConfigRecord({})})
        messages = [Message(content, node, "get_properties", ttl=HELLO_SECONDS, group_id="hello") for node in nodes]
        names: dict[int, str] = {}
        for reply in self._grid.send_and_receive(messages, timeout=HELLO_SECONDS) if messages else ():
            node = reply.metadata.src_node_id
            if reply.has_error():
                self._refuse(f"node {node}", f"it does not answer a hello: {reply.error.reason}")
                continue
            try:
                hello = Hello.from_config(reply.content.config_records.get("getpropertiesres.properties"))
            except WireError as error:
                self._refuse(f"node {node}", str(error))
                continue
            differing = [
                f"{f.name} {getattr(hello, f.name)} there, {getattr(self._expected, f.name)} here"
                for f in fields(Hello)
                if f.name not in OWN and getattr(hello, f.name) != getattr(self._expected, f.name)
            ]
            if differing:
                self._refuse(hello.name, "; ".join(differing))
            else:
                names[node] = hello.name
        return names

    def _refuse(self, client: str, reason: str) -> None:
        if self.refused.get(client) != reason:
            logger.warning("client %s is refused: %s", client, reason)
        self.refused[client] = reason
