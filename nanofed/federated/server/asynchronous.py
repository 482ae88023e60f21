"""The loop without rounds: every client always has one message, and its update is merged when it comes.

Each merge is a round of one client by the run's clock, so that ledger, validation, norm guard, evaluation, checkpoint and resume
are those of rounds. What differs is who is waited for, which weights an update is read against, and the outer step
(`DelayedNesterov`, `damping`). After a restart of the server, clients that still train are sent new messages: what they have
trained is lost, and their rows are read again.

With N clients the server encodes, steps and saves N times where rounds do once. It keeps each version of the weights from which
a client still trains, N at most: in a deployment as files, elsewhere in memory. `DelayedNesterov` keeps two arrays a parameter.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from nanofed.errors import NanofedError
from nanofed.federated.aggregation import make_aggregator
from nanofed.federated.aggregation.norm_guard import UnusualNorm
from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.server.events import SERVER
from nanofed.federated.server.messenger import ClientReply
from nanofed.federated.server.metrics import RoundMetrics
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.server.validation import RefusedReply, Update
from nanofed.federated.wire.codec import payload_bytes
from nanofed.federated.wire.messages import Instructions

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0  # between two looks for clients that have come


@dataclass(frozen=True)
class _InFlight:
    """What a client was sent: the weights are shared by all that were sent the same, and are freed with the last of them."""

    node: int
    instructions: Instructions
    sent: SentWeights


class AsynchronousLoop(RoundLoop):
    """Trains a model over the clients of a grid without waiting for any of them; the arguments are those of `RoundLoop`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_flight: dict[str, _InFlight] = {}
        self._refusals: Counter[str] = Counter()  # of a client, in a row
        self._paused: dict[str, float] = {}  # client -> until when it is sent nothing, on the monotonic clock

    def _rounds(self) -> None:
        try:
            super()._rounds()
        finally:
            self._messenger.give_up()  # what is trained beyond the end

    def _train_and_merge(self, present: Mapping[str, int], figures: RoundMetrics) -> bool:
        """Merge the first update that can be merged, while all other clients train; tell whether there was one.

        There was none where as many in a row as there are clients could not be.
        """
        figures.asked, started = 0, time.monotonic()
        try:
            self._send(present, figures)
            self._save()  # before the weights are stepped
            looked = time.monotonic()
            while True:
                with closing(self._messenger.arrivals(figures.round)) as arrivals:
                    for reply in arrivals:
                        if self._merge(reply, figures):
                            figures.exchange = time.monotonic() - started - figures.merge - figures.encode
                            return True
                        if figures.asked >= len(present):
                            return False
                        looked = -math.inf  # the client is sent another message
                if time.monotonic() - looked > LOOK_SECONDS:
                    self._send(self._participants(figures.round, 0), figures)
                    self._say("training", figures.round, clients=sorted(self._in_flight))
                    looked = time.monotonic()
                self._messenger.rest()
        except NanofedError as error:  # the disk on which weights or updates are kept is full
            self.state.events.add("disk", SERVER, error, figures.round)
            logger.warning("round %d: %s", figures.round, error)
            return False

    def _send(self, present: Mapping[str, int], figures: RoundMetrics) -> None:
        """Send the newest weights to all clients that are there and have no message."""
        started, number, state = time.monotonic(), figures.round, self.state
        for client, node in present.items():
            if client in self._in_flight and self._in_flight[client].node != node:
                del self._in_flight[client]
                self._messenger.give_up(client)
                self._refuse(client, figures, RefusedReply("silent", "it was started again, and has lost its message"))
        idle = [name for name in present if name not in self._in_flight and started >= self._paused.get(name, 0.0)]
        if not idle:
            return
        same = [each.sent for each in self._in_flight.values() if each.instructions.round == number]
        sent = same[0] if same else self._downlink.encode(state, idle)
        among = sorted({*self._in_flight, *idle})
        asked = self._scheduler.instruct(number, idle, state, self._downlink.base_hash, {}, among)
        self._tell_batch(asked[idle[0]])
        seconds = self._scheduler.time_limit(state.clock.tokens, self._turns(len(among)))
        self._messenger.send({client: present[client] for client in idle}, asked, sent, seconds=seconds)
        self._in_flight |= {client: _InFlight(present[client], asked[client], sent) for client in idle}
        figures.encode += time.monotonic() - started

    def _turns(self, clients: int) -> int:
        """Return how many messages are answered before the last one of so many clients', where they take turns."""
        speeds = self._config.client_speeds
        return math.ceil(sum(speeds) / min(speeds)) if speeds else clients

    def _merge(self, reply: ClientReply[Update], figures: RoundMetrics) -> bool:
        """Merge a client's update, and tell whether it could be."""
        client, started, merged = reply.client, time.monotonic(), False
        figures.in_flight = len(self._in_flight)
        flight = self._in_flight.pop(client)
        figures.asked += 1
        figures.client_bytes_up = flight.sent.up.nbytes(flight.sent.weights)
        figures.client_bytes_down[client] = payload_bytes(flight.sent.payload)
        try:
            if isinstance(reply.result, RefusedReply):
                raise reply.result
            with make_aggregator("mean", flight.sent, self._run / "spool") as aggregator:
                self._fold(reply.result, flight.instructions, reply.seconds, aggregator, figures)
                self._compare(aggregator, figures)
                figures.merge += time.monotonic() - started
                merged = bool(figures.merged) and self._commit(aggregator, {client: flight.instructions}, figures)
        except (RefusedReply, UnusualNorm) as refusal:
            self._refuse(client, figures, refusal)
        self._hurry_late()
        self._refusals[client] = 0 if merged else self._refusals[client] + 1
        self._paused[client] = time.monotonic() + self._policy.pause(self._refusals[client])
        if not merged:
            figures.merged.clear()
        return merged
