"""The clients of a federation: who is connected, who is who, and who takes part in a round."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from nanofed.errors import NanofedError
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.events import SERVER, Events
from nanofed.federated.server.policy import ClientPolicy
from nanofed.federated.wire.codec import WireError
from nanofed.federated.wire.messages import Hello
from nanofed.federated.wire.plain_text import plain

logger = logging.getLogger(__name__)

# What a client says of itself that may differ from the server's.
OWN = ("name", "versions", "devices", "tokens_per_second", "shards", "dataset")
SAME_VERSIONS = ("nanofed", "flwr")  # they decide what travels; another torch computes the same up to rounding
HELLO_SECONDS = 120.0  # until a client that does not answer a hello is refused
POLL_SECONDS = 0.1
ASK_AGAIN_SECONDS = 60.0  # by then Flower has forgotten a dead node, whose successor goes by the same name
RECOVERY_SECONDS = 15.0  # until a node that could not answer is asked again: its site may be starting something anew
LOOK_SECONDS = 0.5  # between two looks at who is connected, while a round waits for its quorum
SAY_SECONDS = 60.0  # between two lines of the log about that


class Clients:
    """Flower's nodes and the named clients behind them, each checked before its first round.

    Args:
        expected: What every client must say of itself, except for `OWN`.
        events: They count refusals and rounds that could not begin.
        seed: The seed of the draws of who is available.
        admit: It is called with the hello of a client that fits; a NanofedError from it refuses the client.
        owners: It returns node -> the client whose key the node has; None where nodes have no keys.

    Attributes:
        names: node -> the client behind it, for those connected at the last look.
        refused: client (or `node N`) -> why it may not take part, or was not merged.
        seen: client -> when it was last connected, on the monotonic clock.
        round: the round that events are counted under.
    """

    def __init__(
        self,
        grid: Grid,
        expected: Hello,
        config: FederationConfig,
        events: Events,
        policy: ClientPolicy,
        *,
        seed: int = 0,
        admit: Callable[[Hello], None] = lambda hello: None,
        owners: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        self._grid = grid
        self._expected = expected
        self._config = config
        self._events = events
        self._policy = policy
        self._seed = seed
        self._admit = admit
        self._owners = owners
        self._asked: dict[int, float] = {}  # node -> when it was last asked who it is
        self._pending: dict[str, int] = {}  # message id of a hello -> node
        self.names: dict[int, str] = {}
        self.refused: dict[str, str] = {}
        self.seen: dict[str, float] = {}
        self.round = 0

    # --- who is connected

    def connected(self) -> dict[str, int]:
        """Return client name -> node id of those connected now; new nodes are asked who they are first."""
        nodes = set(self._grid.get_node_ids())
        now = time.monotonic()
        self.names = {node: name for node, name in self.names.items() if node in nodes}
        self._asked = {node: when for node, when in self._asked.items() if node in nodes}
        for who in [who for who in self.refused if who.startswith("node ") and int(who[5:]) not in nodes]:
            del self.refused[who]
        for node in sorted(nodes - self.names.keys() - set(self._pending.values())):
            if now - self._asked.get(node, -ASK_AGAIN_SECONDS) >= ASK_AGAIN_SECONDS:
                self._asked[node] = now
                content = RecordDict({"getpropertiesins.config": ConfigRecord({})})
                message = Message(content, node, "get_properties", ttl=HELLO_SECONDS, group_id="hello")
                self._pending.update(dict.fromkeys(self._grid.push_messages([message]), node))
        self._take_hellos()
        self.seen.update(dict.fromkeys(self.names.values(), time.monotonic()))
        return {name: node for node, name in sorted(self.names.items(), key=lambda item: item[1])}

    def _take_hellos(self) -> None:
        """Take the hellos that are there; those just asked for are waited for."""
        while self._pending:
            for reply in [r for key in list(self._pending) for r in self._grid.pull_messages([key])]:
                node = self._pending.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    self._take(node, reply)
            ages = {
                key: time.monotonic() - self._asked.get(node, -HELLO_SECONDS) for key, node in self._pending.items()
            }
            for key in [key for key, age in ages.items() if age >= HELLO_SECONDS]:
                self._refuse(f"node {self._pending.pop(key)}", f"it has not answered a hello for {HELLO_SECONDS:.0f} s")
            if not any(ages[key] < self._policy.hello_patience for key in self._pending):
                return
            time.sleep(POLL_SECONDS)

    def _take(self, node: int, reply: Message) -> None:
        who = f"node {node}"
        try:
            if reply.has_error():
                self._asked[node] = time.monotonic() - ASK_AGAIN_SECONDS + RECOVERY_SECONDS
                raise NanofedError(f"it does not answer a hello: {reply.error.reason}")
            hello = Hello.from_config(reply.content.config_records.get("getpropertiesres.properties"))
            if self._owners is not None and (owner := self._owners().get(node)) != hello.name:
                raise NanofedError(f"it goes by the name {hello.name}, and its key is that of {owner or 'nobody'}")
            who = hello.name
            if reason := self._why_not(hello):
                raise NanofedError(reason)
            self._admit(hello)
        except (WireError, NanofedError) as error:
            self._refuse(who, str(error))
            return
        self.names[node] = hello.name
        self.refused.pop(hello.name, None)
        for package, version in self._expected.versions.items():
            if (theirs := hello.versions.get(package)) != version:
                logger.warning("client %s has %s %s, the server %s", hello.name, package, theirs, version)

    def _why_not(self, hello: Hello) -> str:
        """Return in what a client differs from what it has to be, with both values; nothing if it may take part."""
        if hello.name in self.names.values():
            return "another node already goes by that name"
        expected = self._expected
        differing = [
            _differing(f.name, getattr(hello, f.name), getattr(expected, f.name))
            for f in fields(Hello)
            if f.name not in OWN and getattr(hello, f.name) != getattr(expected, f.name)
        ]
        if self._config.sharding != "local" and hello.dataset != expected.dataset:
            differing += expected.text.differences(hello.text) or ["the validation shard holds other text"]
        differing += [
            f"{package} {hello.versions.get(package)} there, {expected.versions[package]} here"
            for package in SAME_VERSIONS
            if hello.versions.get(package) != expected.versions[package]
        ]
        return "; ".join(differing)

    def _refuse(self, client: str, reason: str) -> None:
        reason = plain(reason, 1000)
        if self.refused.get(client) != reason:
            logger.warning("client %s is refused: %s", client, reason)
        self.refused[client] = reason
        self._events.add("hello", client, reason, self.round)

    # --- who takes part

    def wait(self, number: int, meanwhile: Callable[[str], None] = lambda waiting: None) -> dict[str, int]:
        """Return client -> node of those connected, once they are a quorum.

        Across sites the wait has no end, since sites come back. The log says at once, and then every minute, how many and
        whom the round waits for; every `quorum_seconds` that is a warning and an event.

        Args:
            number: The round that is to begin.
            meanwhile: It is called twice a second with what is waited for.

        Raises:
            NanofedError: The clients share this machine, and too few of them can take part.
        """
        config, quorum = self._config, self._config.quorum
        started = time.monotonic()
        said, warned = -SAY_SECONDS, 0
        while len(connected := self.connected()) < quorum:
            waited = time.monotonic() - started
            waiting = f"{quorum - len(connected)} more clients of {quorum} ({self._who(connected)})"
            if self._policy.one_machine and (self.refused or waited > config.quorum_seconds):
                raise NanofedError(
                    f"round {number} needs {quorum} clients, {len(connected)} can take part ({self.why()}); "
                    "the run goes on from its last checkpoint with --ckpt_path last"
                )
            if waited > config.quorum_seconds * (warned + 1):
                said, warned = waited, warned + 1
                reason = f"it cannot begin for {waited:.0f} s: it needs {waiting}"
                logger.warning("round %d: %s", number, reason)
                self._events.add("quorum", SERVER, reason, number)
            elif waited - said >= SAY_SECONDS:
                said = waited
                logger.info("round %3d  waiting for %s", number, waiting)
            meanwhile(waiting)
            time.sleep(LOOK_SECONDS)
        return connected

    def draw(self, connected: Mapping[str, int], number: int, attempt: int) -> dict[str, int]:
        """Draw who is available: each with its chance, the same draw for the same seed, round, attempt and name."""
        chance = self._config.availability
        return {
            name: node
            for name, node in connected.items()
            if chance >= 1 or random.Random(f"{self._seed}/{number}.{attempt}/{name}").random() < chance
        }

    def why(self) -> str:
        """Return who is refused, and why."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.refused.items()) or "none was refused"

    def _who(self, connected: Mapping[str, int]) -> str:
        now = time.monotonic()
        parts = [f"here: {', '.join(connected) or 'nobody'}"]
        for name, seen in sorted(self.seen.items()):
            if name not in connected:
                parts.append(f"{name} was here {(now - seen) / 60:.0f} min ago")
        return "; ".join([*parts, f"refused: {self.why()}"] if self.refused else parts)


def _differing(name: str, there: Any, here: Any) -> str:
    """Say how two values of a hello differ; of two mappings, in which of their keys."""
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        return f"{name} {there} there, {here} here"
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    return "; ".join(f"{name}.{key} {there.get(key)} there, {here.get(key)} here" for key in keys)
