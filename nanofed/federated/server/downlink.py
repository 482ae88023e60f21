"""How the global weights of a round go down: whole, or to those who hold earlier ones as what changed."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.state import State
from nanofed.federated.wire.changes import changed
from nanofed.federated.wire.codec import CODECS, hash_arrays
from nanofed.federated.wire.weight_transport import WeightTransport


class Downlink:
    """Encodes the global weights for the clients of a round.

    With `down_codec` int8 or int4 all clients of a round hold the same weights in bf16, and so does the state (`State.held`):
    they take one step towards the global weights with each commit, whoever takes part, so a run that is resumed goes on in the
    same bits. A round that is tried again sends the same weights again, whole.

    Args:
        config: The federation's codecs.
        transport: It takes the encoded weights.

    Attributes:
        holders: The clients that have answered the last round, and so hold its weights.
        base_hash: The hash of the weights that were encoded last.
    """

    def __init__(self, config: FederationConfig, transport: WeightTransport) -> None:
        self._down, self._up = CODECS[config.down_codec], CODECS[config.up_codec]
        self._transport = transport
        self._keep = config.asynchronous
        self._step_tokens = -1  # at which the held weights took their last step
        self.holders: set[str] = set()
        self.base_hash = ""

    def encode(self, state: State, clients: Collection[str]) -> SentWeights:
        """Return the weights that a round is sent.

        Raises:
            NanofedError: There is no room for them.
        """
        down, whole, weights = self._down, self._down.whole, state.weights
        if whole is down:
            state.held = None
            payload = self._transport.encode(weights, down)
            if self._keep and any(map(np.may_share_memory, payload, weights.values())):
                payload = [array.copy() for array in payload]  # of the weights themselves, which the next merge steps
            self.base_hash = hash_arrays(payload)
            return SentWeights(weights, payload, down, self._up)
        changes, changed_from = None, dict.fromkeys(self.holders.intersection(clients), self.base_hash)
        self.holders.clear()
        if state.held is None:
            state.held = whole.encode(weights)
        elif self._step_tokens != state.clock.tokens:
            changes = self._transport.encode(weights, down, whole.parts(state.held, weights))
            # New arrays: a checkpoint of the round before may still be written from the old ones.
            state.held = changed(state.held, changes, down, weights)
        if changes is None:
            changed_from.clear()
        self._step_tokens = state.clock.tokens
        self.base_hash = hash_arrays(state.held)
        everyone = len(changed_from) == len(clients)
        payload = state.held if everyone else self._transport.place(state.held)
        return SentWeights(weights, payload, whole, self._up, changes, changed_from)
