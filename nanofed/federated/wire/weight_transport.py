"""How the weights of a round get to its clients and back: in Flower's messages, or beside them (`weight_store.py`).

An array stands in a message as the bytes of a .npy file, with one copy to get in and none to get out: Flower's own ways there
copy several times, through files in memory.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message

from nanofed.federated.wire.codec import Arrays, Codec, Part, Weights, WireError, payload_bytes

KIND = "numpy.ndarray"  # what Flower calls these arrays


class RoundWeights:
    """The weights of one round on their way to the clients and back, in Flower's messages.

    Args:
        payloads: client -> its encoded weights; messages of the same arrays share one record.

    Attributes:
        message_bytes: The size of the arrays in all records.
    """

    def __init__(self, payloads: Mapping[str, Arrays]) -> None:
        distinct = {id(payload): payload for payload in payloads.values()}
        records = {
            key: ArrayRecord({str(index): to_flower(array) for index, array in enumerate(payload)})
            for key, payload in distinct.items()
        }
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
        return [from_flower(record.pop(name)) for name in list(record)]

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


def to_flower(array: npt.NDArray[np.generic]) -> Array:
    """Return Flower's array with the same content."""
    array = np.asarray(array, order="C")
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    data = b"".join((head.getvalue(), array.reshape(-1).view(np.uint8).data))
    return Array(dtype=str(array.dtype), shape=tuple(array.shape), stype=KIND, data=data)


def from_flower(array: Array) -> npt.NDArray[np.generic]:
    """Return the content of Flower's array, read-only, on the same memory where that is aligned.

    Raises:
        ValueError: The content is no array of numbers, or has fewer or more bytes than it says.
    """
    if array.stype != KIND:
        raise ValueError(f"it is {array.stype!r:.40}, not {KIND!r}")
    head = io.BytesIO(array.data)  # reads, and so copies, no more than the header
    version = np.lib.format.read_magic(head)
    if version != (1, 0):
        raise ValueError(f"its format has version {version}")
    shape, in_columns, dtype = np.lib.format.read_array_header_1_0(head)
    start = head.tell()
    content = np.frombuffer(array.data, dtype, offset=start) if start < len(array.data) else np.empty(0, dtype)
    return np.require(content.reshape(shape, order="F" if in_columns else "C"), requirements="A")
