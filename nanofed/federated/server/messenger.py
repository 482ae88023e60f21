"""The server's messages over Flower's Grid: send one to every client, and take the replies one at a time."""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.server.events import SERVER, Events
from nanofed.federated.server.validation import RefusedReply, ReplyMetrics, Update, check_reply
from nanofed.federated.wire.codec import Arrays
from nanofed.federated.wire.messages import LIFE, Evaluate, Instructions
from nanofed.federated.wire.weight_transport import RoundWeights, WeightTransport

POLL_SECONDS = 0.1
MAX_POLL_SECONDS = 1.0  # every client is asked for by itself: with many of them, less often
T = TypeVar("T")

# Flower's messages are cycles, with the weights where these are in them: few objects, so that Python would look too late.
WASTE_BYTES = 64 << 20
REMEMBERED = 1000  # messages of earlier rounds, whose replies can still be told apart


@dataclass(frozen=True)
class ClientReply(Generic[T]):
    """What came of one client's message."""

    client: str
    result: T | RefusedReply  # what was asked for, such as an update to be merged, or why there is none
    seconds: float  # the time from the dispatch until the reply was here and checked


@dataclass
class _Asked(Generic[T]):
    """A message whose answer is waited for."""

    client: str
    node: int
    round: int
    weights: RoundWeights  # the weights on their way, of this message or of all messages of a round
    check: Callable[[str, Message], T]  # it returns what the answer holds, or raises `RefusedReply`
    started: float  # when the answer's seconds begin to count, on the monotonic clock
    seconds: float  # the seconds after which the client is given up
    trains: float  # the seconds for which the client is asked to train; no answer is expected before they are over


class Messenger:
    """Sends messages to clients and takes their replies; a reply that nobody waits for is counted and dropped.

    Args:
        events: They count the replies that nobody waits for.
        transport: It moves the weights; by default they are in the messages.
        streams: The number of streams of every client's data.
        most_pending: The documents that a stream's packer may hold.

    Attributes:
        transport: It encodes the weights for the next `send` or `send_evaluation`.
        late: The clients whose replies came too late since somebody emptied this set.
    """

    def __init__(
        self, grid: Grid, events: Events, transport: WeightTransport | None = None, *, streams: int, most_pending: int
    ) -> None:
        self._grid = grid
        self._events = events
        self.transport = transport or WeightTransport()
        self._limits = {"streams": streams, "most_pending": most_pending}
        self.late: set[str] = set()
        self._waiting: dict[str, _Asked[Any]] = {}  # message ->
        self._given_up: OrderedDict[str, tuple[str, int]] = OrderedDict()  # message -> client and round
        self._answered: OrderedDict[str, str] = OrderedDict()  # message -> client

    def send(
        self,
        nodes: Mapping[str, int],
        instructions: Mapping[str, Instructions],
        sent: SentWeights,
        *,
        seconds: float,
        requests: Mapping[str, Evaluate] = MappingProxyType({}),
    ) -> None:
        """Send clients what they are to do; `replies` and `arrivals` say what comes of it, an `Update` of each.

        Args:
            nodes: The node id of each client.
            instructions: What each client is to do.
            sent: The weights, the same for all clients once they have them.
            seconds: A client is given up after this time; a reply within as much time again is named as late.
            requests: What each client is to evaluate of these weights before it trains.
        """
        payloads = {client: sent.payload_for(client) for client in nodes}
        weights = self.transport.offer(payloads, sent.up.nbytes(sent.weights), seconds)

        def check(client: str, reply: Message) -> Update:
            return check_reply(reply, instructions[client], sent, weights, **self._limits)

        for client, node in nodes.items():
            told = instructions[client]
            config = told.to_config() | (requests[client].to_config() if client in requests else {})
            asked = _Asked(client, node, told.round, weights, check, time.monotonic(), seconds, told.seconds or 0.0)
            self._send(MessageType.TRAIN, "fitins", config, asked)
        weights.sent()
        if weights.message_bytes > WASTE_BYTES:
            gc.collect()

    def send_evaluation(
        self, nodes: Mapping[str, int], requests: Mapping[str, Evaluate], payload: Arrays, *, seconds: float
    ) -> None:
        """Send weights to be evaluated and nothing else; `replies` says what comes of it, the `ReplyMetrics` of each client.

        Args:
            nodes: The node id of each client.
            requests: What each client is to evaluate.
            payload: The weights, in the codec that the requests name.
            seconds: A client is given up after this time.
        """
        weights = self.transport.offer(dict.fromkeys(nodes, payload), 0, seconds)
        for client, node in nodes.items():
            told = requests[client]
            asked = _Asked(client, node, told.round, weights, _metrics_of, time.monotonic(), seconds, 0.0)
            self._send(MessageType.EVALUATE, "evaluateins", told.to_config(), asked)
        weights.sent()

    def replies(self, number: int, meanwhile: Callable[[], None] = lambda: None) -> Iterator[ClientReply[Any]]:
        """Yield what comes of each message that is waited for, in the order of arrival, and wait for none of them after that.

        Args:
            number: The round under which replies are counted that nobody waits for.
            meanwhile: It is called once, while the clients train; what it takes is not counted as their time.
        """
        try:
            paused = time.monotonic()
            meanwhile()
            for asked in self._waiting.values():
                asked.seconds += time.monotonic() - paused  # the clients' answers wait meanwhile
            while self._waiting:
                idle = True
                for reply in self.arrivals(number):
                    idle = False
                    yield reply
                    del reply
                if idle:
                    self.rest()
        finally:
            self.give_up()

    def arrivals(self, number: int) -> Generator[ClientReply[Update], None, None]:
        """Look once for what was asked with `send`: yield every client whose answer is there or whose time is over.

        An update is there until the next one is asked for. Who closes the iterator finds the others at the next look.

        Args:
            number: The round under which replies are counted that nobody waits for.
        """
        yield from self._arrived(number)
        now = time.monotonic()
        for asked in [asked for asked in self._waiting.values() if now > asked.started + asked.seconds]:
            self.give_up(asked.client)
            silent = RefusedReply("silent", f"no answer within {asked.seconds:.0f} s")
            yield ClientReply(asked.client, silent, asked.seconds)

    @property
    def waiting_for(self) -> set[str]:
        """The clients whose answers are waited for."""
        return {asked.client for asked in self._waiting.values()}

    def give_up(self, client: str | None = None) -> None:
        """Wait no longer for a client's answer, or for any."""
        for message_id, asked in [*self._waiting.items()]:
            if client in (None, asked.client):
                del self._waiting[message_id]
                _remember(self._given_up, message_id, (asked.client, asked.round))
                self._drop(asked)

    def _send(self, kind: str, record: str, config: dict[str, Any], asked: _Asked[Any]) -> None:
        """Send a message, and wait for its answer from now on."""
        weights, client = asked.weights, asked.client
        settings = ConfigRecord(config | weights.note(client))
        content = RecordDict({f"{record}.config": settings})
        if arrays := weights.record(client):
            content[f"{record}.parameters"] = arrays
        message = Message(content, asked.node, kind, ttl=LIFE * asked.seconds, group_id=str(asked.round))
        self._waiting.update(dict.fromkeys(self._grid.push_messages([message]), asked))

    def rest(self) -> None:
        """Sleep until it is worth looking for answers again: a look costs the SuperLink 10 ms, and few come while all train."""
        trained = min((asked.started + asked.trains for asked in self._waiting.values()), default=0.0)
        pause = max(POLL_SECONDS * len(self._waiting), trained - time.monotonic(), POLL_SECONDS)
        time.sleep(min(MAX_POLL_SECONDS, pause))

    def _arrived(self, number: int) -> Iterator[ClientReply[Any]]:
        """Look once for each message's answer, and yield what its check makes of it, or why it refuses it."""
        for reply in self._pull():
            message_id = reply.metadata.reply_to_message_id
            asked = self._waiting.get(message_id)
            if asked is None or not (reply.has_error() or reply.metadata.src_node_id == asked.node):
                self._stray(reply, number)
                continue
            del self._waiting[message_id]
            _remember(self._answered, message_id, asked.client)
            result: Any
            try:
                result = asked.check(asked.client, reply)
            except RefusedReply as refusal:
                result = RefusedReply(refusal.kind, str(refusal))  # the other one's traceback holds the weights
            del reply
            try:
                yield ClientReply(asked.client, result, time.monotonic() - asked.started)
            finally:
                del result
                self._drop(asked)

    def _drop(self, asked: _Asked[Any]) -> None:
        """Free the weights of a message that is not waited for any more."""
        asked.weights.drop(asked.client)
        if all(other.weights is not asked.weights for other in self._waiting.values()):
            asked.weights.close()
            gc.collect()  # a cycle would hold the round's files and memory, and Python hardly looks here: see `FrozenObjects`

    def _pull(self) -> Iterator[Message]:
        """Ask for each message's reply by itself: a grid that is asked for all of them holds all of them in memory."""
        for message_id in [*self._waiting, *self._given_up]:
            if not self._waiting:
                return  # in process, a client that was given up would train now
            yield from self._grid.pull_messages([message_id])

    def _stray(self, reply: Message, number: int) -> None:
        """Count a reply that nobody waits for."""
        message_id = reply.metadata.reply_to_message_id
        if message_id in self._given_up:
            client, asked_in = self._given_up.pop(message_id)
            if not reply.has_error():  # an error is Flower's own word for a message whose time is over
                self.late.add(client)
                self._events.add("late", client, f"its answer to round {asked_in} came when that was over", number)
        elif message_id in self._answered:
            self._events.add("duplicate", self._answered[message_id], "it has answered this message before", number)
        else:
            node = reply.metadata.src_node_id
            self._events.add("foreign", SERVER, f"node {node} answered a message that it was not sent", number)


def _metrics_of(_: str, reply: Message) -> ReplyMetrics:
    if reply.has_error():
        raise RefusedReply("evaluation", f"the client failed: {reply.error.reason}")
    return reply.content.config_records.get("evaluateres.metrics", {})


def _remember(where: OrderedDict[str, T], message_id: str, value: T) -> None:
    where[message_id] = value
    while len(where) > REMEMBERED:
        where.popitem(last=False)
