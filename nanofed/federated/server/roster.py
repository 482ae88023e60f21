"""Who is who: clients by name, checked before their first round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from nanofed.errors import NanofedError
from nanofed.federated.server.events import Events
from nanofed.federated.wire.codec import WireError
from nanofed.federated.wire.messages import Hello
from nanofed.federated.wire.plain import plain

logger = logging.getLogger(__name__)

OWN = ("name", "versions", "devices", "tokens_per_second", "shards")  # may differ from the server's
SAME_VERSIONS = ("nanofed", "flwr")  # of what travels; another Python or torch computes the same up to rounding
HELLO_SECONDS = 120.0  # a fresh Ray actor imports torch before it answers
PATIENCE_SECONDS = 15.0  # for which a round is held up by who has just come, where clients are machines of their own
POLL_SECONDS = 0.1
ASK_AGAIN_SECONDS = 60.0  # by then Flower has forgotten a dead node, of which its successor has the name
RECOVERY_SECONDS = 15.0  # until a node that could not answer is asked again: its site may be starting something anew


class Roster:
    """Flower's node ids and the clients behind them.

    Args:
        grid: the connection to the nodes.
        expected: what every client must say of itself, but for what is its own.
        events: where refusals are counted.
        simulated: every node is waited for, so that a run takes the same course each time.
        admit: called with the hello of a client that fits; a NanofedError of it is a refusal.
        any_dataset: clients have text of their own.
        owners: returns node -> the client whose key it has; None where nodes have no keys.
    """

    def __init__(
        self,
        grid: Grid,
        expected: Hello,
        events: Events,
        *,
        simulated: bool = True,
        admit: Callable[[Hello], None] = lambda hello: None,
        any_dataset: bool = False,
        owners: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        self._grid = grid
        self._expected = expected
        self._events = events
        self._patience = HELLO_SECONDS if simulated else PATIENCE_SECONDS
        self._admit = admit
        self._owners = owners
        self._own = (*OWN, "dataset") if any_dataset else OWN
        self._names: dict[int, str] = {}
        self._asked: dict[int, float] = {}  # node -> when it was last asked
        self._pending: dict[str, int] = {}  # message id of a hello -> node
        self.refused: dict[str, str] = {}  # client (or node) -> why
        self.hellos: dict[str, Hello] = {}  # of clients that were admitted
        self.seen: dict[str, float] = {}  # client -> when it was last connected
        self.round = 0  # for the events

    @property
    def clients(self) -> list[str]:
        """Who was connected when that was last asked."""
        return sorted(self._names.values())

    def connected(self) -> dict[str, int]:
        """Return client name -> node id of those connected now; new nodes are asked who they are first."""
        nodes = set(self._grid.get_node_ids())
        now = time.monotonic()
        self._names = {node: name for node, name in self._names.items() if node in nodes}
        self._asked = {node: when for node, when in self._asked.items() if node in nodes}
        gone = [who for who in self.refused if who.startswith("node ") and int(who[5:]) not in nodes]
        for who in gone:
            del self.refused[who]
        for node in sorted(nodes - self._names.keys()):
            if (
                now - self._asked.get(node, -ASK_AGAIN_SECONDS) >= ASK_AGAIN_SECONDS
                and node not in self._pending.values()
            ):
                self._asked[node] = now
                self._ask(node)
        self._hear(now)
        self.seen.update(dict.fromkeys(self._names.values(), time.monotonic()))
        return {name: node for node, name in sorted(self._names.items(), key=lambda item: item[1])}

    def _ask(self, node: int) -> None:
        content = RecordDict({"getpropertiesins.config": ConfigRecord({})})
        message = Message(content, node, "get_properties", ttl=HELLO_SECONDS, group_id="hello")
        self._pending.update(dict.fromkeys(self._grid.push_messages([message]), node))

    def _hear(self, now: float) -> None:
        """Take the answers that are there; those just asked are waited for."""
        while self._pending:
            for reply in [r for key in list(self._pending) for r in self._grid.pull_messages([key])]:
                node = self._pending.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    self._take(node, reply)
            for key, node in list(self._pending.items()):
                if time.monotonic() - self._asked.get(node, -HELLO_SECONDS) >= HELLO_SECONDS:
                    del self._pending[key]
                    self._refuse(f"node {node}", f"it has not answered a hello for {HELLO_SECONDS:.0f} s")
            young = [node for node in self._pending.values() if time.monotonic() - self._asked[node] < self._patience]
            if not young:
                return
            time.sleep(POLL_SECONDS)

    def _take(self, node: int, reply: Message) -> None:
        if reply.has_error():
            self._refuse(f"node {node}", f"it does not answer a hello: {reply.error.reason}")
            self._asked[node] = time.monotonic() - ASK_AGAIN_SECONDS + RECOVERY_SECONDS
            return
        try:
            hello = Hello.from_config(reply.content.config_records.get("getpropertiesres.properties"))
        except WireError as error:
            self._refuse(f"node {node}", str(error))
            return
        if self._owners is not None and (owner := self._owners().get(node)) != hello.name:
            self._refuse(
                f"node {node}", f"it goes by the name {hello.name}, and its key is that of {owner or 'nobody'}"
            )
            return
        if reason := self._why_not(hello):
            self._refuse(hello.name, reason)
            return
        try:
            self._admit(hello)
        except NanofedError as error:
            self._refuse(hello.name, str(error))
            return
        self._names[node] = hello.name
        self.hellos[hello.name] = hello
        self.refused.pop(hello.name, None)
        for package, version in self._expected.versions.items():
            if (theirs := hello.versions.get(package)) != version:
                logger.warning("client %s has %s %s, the server %s", hello.name, package, theirs, version)

    def _why_not(self, hello: Hello) -> str:
        """Return in what a client differs from what it has to be, with both values; nothing if it may take part."""
        if hello.name in self._names.values():
            return "another node already goes by that name"
        differing = [
            _differing(f.name, getattr(hello, f.name), getattr(self._expected, f.name))
            for f in fields(Hello)
            if f.name not in (*self._own, "dataset") and getattr(hello, f.name) != getattr(self._expected, f.name)
        ]
        if "dataset" not in self._own and hello.dataset != self._expected.dataset:
            differing += self._expected.text.differences(hello.text) or ["the validation shard holds other text"]
        differing += [
            f"{package} {hello.versions.get(package)} there, {self._expected.versions[package]} here"
            for package in SAME_VERSIONS
            if hello.versions.get(package) != self._expected.versions[package]
        ]
        return "; ".join(differing)

    def _refuse(self, client: str, reason: str) -> None:
        reason = plain(reason, 1000)
        if self.refused.get(client) != reason:
            logger.warning("client %s is refused: %s", client, reason)
        self.refused[client] = reason
        self._events.add("hello", client, reason, self.round)


def _differing(name: str, there: Any, here: Any) -> str:
    """Say how two values of a hello differ; of two mappings, in which of their keys."""
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        return f"{name} {there} there, {here} here"
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    return "; ".join(f"{name}.{key} {there.get(key)} there, {here.get(key)} here" for key in keys)
