"""How the weights of a round get to its clients and back: in Flower's messages, or beside them (`weight_store.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from flwr.app import ArrayRecord, Message

from nanofed.federated.wire.codec import Arrays, Codec, Room, Weights, WireError, payload_bytes
from nanofed.federated.wire.flower_arrays import from_flower, to_flower


class RoundWeights(Protocol):
    """One round's weights on their way.

    Attributes:
        record: what each message holds of them.
        message_bytes: its bytes.
    """

    record: ArrayRecord
    message_bytes: int

    def note(self, client: str) -> dict[str, Any]:
        """Return what a client's message says of them."""

    def sent(self) -> None:
        """Let go what only the sending needed."""

    def take(self, client: str, reply: Message, codec: Codec, like: Weights) -> Arrays:
        """Return what a client sent back, which from now on nobody else can change.

        Raises:
            WireError: nothing came, or no arrays.
        """

    def drop(self, client: str) -> None:
        """Let what a client sent back go: its arrays are not read any more."""

    def close(self) -> None:
        """Let everything go; whatever comes later has no place."""


class WeightTransport(Protocol):
    """Carries weights, round after round."""

    @property
    def room(self) -> Room | None:
        """Where weights are to be encoded; None for anywhere."""

    def offer(self, payload: Arrays, clients: Sequence[str], answer_bytes: int, seconds: float) -> RoundWeights:
        """Take up the weights of a round.

        Args:
            payload: the weights, encoded in `room` just before.
            clients: whom they go to.
            answer_bytes: of what each sends back; 0 where these are no weights.
            seconds: that it may take.

        Raises:
            NanofedError: there is no room for them.
        """


class InMessages:
    """Weights travel in the messages: all clients are in this process, or in one simulation with it."""

    room: Room | None = None

    def offer(self, payload: Arrays, clients: Sequence[str], answer_bytes: int, seconds: float) -> RoundWeights:
        """Put them into a record that all messages share."""
        return _RoundInMessages(payload)


class _RoundInMessages:
    def __init__(self, payload: Arrays) -> None:
        self.record = ArrayRecord({str(index): to_flower(array) for index, array in enumerate(payload)})
        self.message_bytes = payload_bytes(payload)

    def note(self, client: str) -> dict[str, Any]:
        return {}

    def sent(self) -> None:
        self.record = ArrayRecord()  # in process, the messages shared it

    def take(self, client: str, reply: Message, codec: Codec, like: Weights) -> Arrays:
        return arrays_in(reply)

    def drop(self, client: str) -> None: ...

    def close(self) -> None: ...


def arrays_in(reply: Message) -> Arrays:
    """Return the arrays of a reply, and leave it without them.

    Raises:
        WireError: there are none.
    """
    record = reply.content.array_records.get("fitres.parameters")
    if record is None:
        raise WireError("there are no weights in it")
    return [from_flower(record.pop(name)) for name in list(record)]
