"""How the weights of a round get to its clients and back: in Flower's messages, or beside them (`weight_store.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from flwr.app import ArrayRecord, Message

from nanofed.federated.wire.codec import Arrays, Codec, Room, Weights, WireError, payload_bytes
from nanofed.federated.wire.flower_arrays import from_flower, to_flower


class RoundWeights(Protocol):
    """The weights of one round on their way to the clients and back.

    Attributes:
        record: The arrays that every message of the round holds; empty where the weights travel beside the messages.
        message_bytes: The size of these arrays.
    """

    record: ArrayRecord
    message_bytes: int

    def note(self, client: str) -> dict[str, Any]:
        """Return the entries that tell a client, in the config of its message, where its weights are."""

    def sent(self) -> None:
        """Free what was needed only until all messages were sent."""

    def take(self, client: str, reply: Message, codec: Codec, like: Weights) -> Arrays:
        """Return the arrays of a client's reply; nobody else can change them from now on.

        Args:
            client: The name of the client.
            reply: Its message.
            codec: The codec that its arrays are encoded with.
            like: Weights whose names and shapes the arrays have to fit.

        Raises:
            WireError: The reply has no arrays.
        """

    def drop(self, client: str) -> None:
        """Free the arrays of a client's reply, which are not read any more."""

    def close(self) -> None:
        """Free everything; a reply that comes later has nowhere to go."""


class WeightTransport(Protocol):
    """Moves weights between the server and its clients, round after round."""

    @property
    def room(self) -> Room | None:
        """A function that makes the buffer into which weights are encoded; None where any memory will do."""

    def offer(self, payload: Arrays, clients: Sequence[str], answer_bytes: int, seconds: float) -> RoundWeights:
        """Offer the weights of a round to its clients.

        Args:
            payload: The encoded weights, in the buffer that `room` returned last.
            clients: The names of the clients that may fetch them.
            answer_bytes: The size of the weights that each client sends back; 0 where it sends none.
            seconds: The seconds within which the weights are fetched and the answers delivered.

        Raises:
            NanofedError: There is no room for the weights or for the answers.
        """


class InMessages:
    """Puts weights into Flower's messages, for clients in this process or in one simulation with it."""

    room: Room | None = None

    def offer(self, payload: Arrays, clients: Sequence[str], answer_bytes: int, seconds: float) -> RoundWeights:
        """Put the weights into a record that all messages share."""
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
    """Take the arrays out of a reply, so that its memory is freed with them.

    Raises:
        WireError: The reply holds no arrays.
    """
    record = reply.content.array_records.get("fitres.parameters")
    if record is None:
        raise WireError("there are no weights in it")
    return [from_flower(record.pop(name)) for name in list(record)]
