"""Where the weights of a round are stored, as a message tells a site.

Inside a message, weights are taken apart, copied and put together again by each of five processes. In a deployment the server
lays them into a store, the message names them, and the site fetches and delivers them piece by piece, over the same address and
perimeter and with the same key: a piece that was lost on the way is sent again, and nothing is held in memory between.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nanofed.federated.wire.weights_calls import TICKET

STORED_WEIGHTS = "stored_weights"  # the key of the entry in the config of a message
MAX_ARRAYS = 1 << 16


def layout_of(arrays: Iterable[Any]) -> list[list[Any]]:
    """Return dtype and shape of each of some NumPy arrays, as JSON can say them."""
    return [[array.dtype.str, list(array.shape)] for array in arrays]


def shapes_of(layout: list[Any]) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return dtype and shape of each array of a layout.

    Raises:
        ValueError: it describes no arrays of numbers.
    """
    if len(layout) > MAX_ARRAYS:
        raise ValueError(f"{len(layout)} arrays are announced, and {MAX_ARRAYS} are allowed")
    found = []
    for entry in layout:
        try:
            name, shape = entry
            dtype = np.dtype(name)
            # Numbers only: whatever else NumPy can describe would be made of foreign bytes. Its own limit is 64 dimensions.
            right = (
                dtype.kind in "biuf" and len(shape) <= 32 and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
            )
        except (TypeError, ValueError, SyntaxError):  # NumPy parses descriptions of dtypes
            right = False
        if not right:
            raise ValueError(f"{repr(entry)[:80]} describes no array of numbers")
        found.append((dtype, tuple(shape)))
    return found


def bytes_of(layout: list[Any]) -> int:
    """Return how many bytes the arrays of a layout have together.

    Raises:
        ValueError: it describes no arrays of numbers.
    """
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes_of(layout))


@dataclass(frozen=True)
class StoredWeights:
    """The file of a round's weights at the server, and the file that takes one site's answer.

    Attributes:
        ticket: The name of the file that holds the weights.
        layout: The dtype and shape of each array in it; their bytes follow each other.
        answer: The name of the file for the answer; empty where no weights are to be sent back.
        answer_bytes: The size of the answer.
        seconds: The seconds, from the arrival of the message, for which both files exist.
    """

    ticket: str
    layout: list[Any]
    answer: str
    answer_bytes: int
    seconds: float

    def to_config(self) -> dict[str, Any]:
        """Return the entry that carries this in the config of a message."""
        return {STORED_WEIGHTS: json.dumps(asdict(self))}

    @classmethod
    def found_in(cls, config: Mapping[str, Any]) -> StoredWeights | None:
        """Return what a message's config says, or None where its weights are in the message itself.

        Raises:
            ValueError: The entry cannot be read.
        """
        text = config.get(STORED_WEIGHTS)
        if text is None:
            return None
        try:
            stored = cls(**json.loads(text))
            tickets = [stored.ticket, *([stored.answer] if stored.answer else [])]
            right = all(TICKET.fullmatch(ticket) for ticket in tickets) and isinstance(stored.layout, list)
            if not right or stored.answer_bytes < 0 or not 0 < stored.seconds < 1e9:
                raise ValueError("a field is of the wrong kind")
        except (TypeError, ValueError) as error:
            raise ValueError(f"what the message says of the round's weights cannot be read: {error}") from error
        return stored
