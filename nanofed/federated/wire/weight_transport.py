"""How the weights of a round get to its clients and back: in Flower's messages, or beside them (`weight_store.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, Message

from nanofed.federated.wire.codec import Arrays, Codec, Part, Weights, WireError, payload_bytes


class RoundWeights:
    """The weights of one round on their way to the clients and back, in Flower's messages.

    Args:
        payloads: client -> its encoded weights; messages of the same arrays share one record.

    Attributes:
        message_bytes: The size of the arrays in all records.
    """

    def __init__(self, payloads: Mapping[str, Arrays]) -> None:
        distinct = {id(payload): payload for payload in payloads.values()}
        records = {key: ArrayRecord(payload) for key, payload in distinct.items()}
        self._records = {client: records[id(payload)] for client, payload in payloads.items()}
        self.message_bytes = sum(map(payload_bytes, distinct.values()))

    def record(self, client: str) -> ArrayRecord:
        """Return the arrays that a client's message holds: none where the weights travel beside the messages."""
        return self._records.get(client, ArrayRecord())

    def note(self, client: str) -> dict[str, Any]:
        """Return the entries that tell a client, in the config of its message, where its weights are."""
        return {}

    def sent(self) -> None:
        """Free what was needed only until all messages were sent: in process, the messages shared the record."""
        self._records.clear()

    def take(self, client: str, reply: Message, codec: Codec, like: Weights) -> Arrays:
        """Return the arrays of a client's reply; nobody else can change them from now on.

        Args:
            client: The name of the client.
            reply: Its message, whose memory is freed with the arrays.
            codec: The codec that its arrays are encoded with.
            like: Weights whose names and shapes the arrays have to fit.

        Raises:
            WireError: The reply has no arrays.
        """
        record = reply.content.array_records.get("fitres.parameters")
        if record is None:
            raise WireError("there are no weights in it")
        return [record.pop(name).numpy() for name in list(record)]

    def drop(self, client: str) -> None:
        """Free the arrays of a client's reply, which are not read any more."""

    def close(self) -> None:
        """Free everything; a reply that comes later has nowhere to go."""


class WeightTransport:
    """Moves weights between the server and its clients, round after round, in Flower's messages.

    That is for clients in this process or in one simulation with it.
    """

    def encode(self, weights: Weights, codec: Codec, base: Mapping[str, Part] | None = None) -> Arrays:
        """Return weights as they are sent, or where there is a base, what they moved, for the next `offer`.

        Raises:
            NanofedError: There is no room for them.
        """
        return codec.encode(weights) if base is None else codec.pack(weights, base)

    def place(self, arrays: Arrays) -> Arrays:
        """Return arrays that are encoded already, for the next `offer`, beside what `encode` returned.

        Raises:
            NanofedError: There is no room for them.
        """
        return arrays

    def offer(self, payloads: Mapping[str, Arrays], answer_bytes: int, seconds: float) -> RoundWeights:
        """Offer the weights of a round to its clients.

        Args:
            payloads: client -> what it may fetch, as `encode` or `place` returned it last.
            answer_bytes: The size of the weights that each client sends back; 0 where it sends none.
            seconds: The seconds within which the weights are fetched and the answers delivered.

        Raises:
            NanofedError: There is no room for the answers.
        """
        return RoundWeights(payloads)
