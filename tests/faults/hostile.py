"""Federations in one process in which replies are tampered with on their way, and what is left of them afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message

from nanofed.federated.federation import Federation
from nanofed.federated.runtimes.in_process import InProcessGrid
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.site.client import client_app
from nanofed.federated.wire.codec import hash_arrays
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.checkpoint.format import read_state, read_weights
from tests.federated.tiny import Site

Tamper = Callable[[Message], list[Message]]


class TamperingGrid(InProcessGrid):
    """Gives what `tamper` makes of each reply to a training message."""

    tamper: Tamper = staticmethod(lambda reply: [reply])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        return [out for reply in replies for out in (self.tamper(reply) if _is_fit(reply) else [reply])]


def _is_fit(reply: Message) -> bool:
    return reply.has_error() or "fitres.metrics" in reply.content.config_records


@dataclass(frozen=True)
class Trace:
    """What a run left: after each saved round the model's hash and the ledger; and the events."""

    hashes: dict[int, str]
    ledgers: dict[int, Any]
    events: dict[str, dict[str, int]]

    def same_course(self, other: Trace) -> bool:
        return (self.hashes, self.ledgers) == (other.hashes, other.ledgers)


def play(
    config: Federation, names: Sequence[str] | None = None, tamper: Tamper | None = None, **behaviour: Any
) -> tuple[RoundLoop, Site, Trace]:
    """Run a federation to its end."""
    run = config.open()
    site = Site(config.trainer(), answered=deque(maxlen=0), **behaviour)  # of 10,000 answers the weights would be 8 GB
    grid = TamperingGrid(client_app(lambda context: site), names or config.federation.client_names)
    if tamper is not None:
        grid.tamper = tamper
    loop = config.loop(grid)
    try:
        loop.train()
    finally:
        loop.metrics.close()
    return loop, site, trace(loop, run)


def trace(loop: RoundLoop, run: Path) -> Trace:
    hashes, ledgers = {}, {}
    for path in checkpoints(run):
        number = int(path.name.removeprefix("round_"))
        saved = read_weights(path)
        hashes[number] = hash_arrays([saved[name].numpy() for name in loop.state.weights])
        ledgers[number] = read_state(path)["ledger"]
    events = {
        client: {str(kind): count.count for kind, count in kinds.items()}
        for client, kinds in loop.state.events.by_client().items()
    }
    return Trace(hashes, ledgers, events)
