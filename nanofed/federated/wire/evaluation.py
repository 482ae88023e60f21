"""What server and site say to each other when sites measure the global weights on text of their own.

A request to evaluate rides with a round: beside the instructions, in the message that brings the weights anyway, so that a
site with a slow link does not take a second copy of the model for it. Only the last weights of a run, after which no round
comes, are sent to be evaluated alone. The answer is sums, nats and bytes: sums of several sites pool exactly, means do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from nanofed.federated.wire.messages import Note

MAX_FAILURE = 500  # characters


@dataclass(frozen=True)
class Evaluate(Note):
    """What a client is to measure.

    The text is that of the server's own evaluation, of the client's validation shard: its first `eval_tokens` targets in document
    order. Forward pass f of it (`nanofed.data.validation`) is this client's where f mod `shares` is `share`. So shares of one
    shard are disjoint and together all of it, and a pass gives the same sums wherever it is computed on the same hardware.

    Attributes:
        run: id of the run.
        round: number of the round whose message this is, from 1; that of the last one where there is no other to come.
        client: name of the client.
        nonce: of this message alone; the answer returns it.
        base_hash: of the arrays that go with it, which are to be measured.
        down_codec: of these arrays.
        eval_tokens: targets of the text, all shares together.
        share: of this client, from 0.
        shares: that there are.
        seconds: after which to give it up, on the client's own clock.
    """

    key: ClassVar[str] = "nanofed.evaluate"

    run: str
    round: int
    client: str
    nonce: str
    base_hash: str
    down_codec: str
    eval_tokens: int
    share: int
    shares: int
    seconds: float

    @classmethod
    def asked_in(cls, config: Mapping[str, Any]) -> Self | None:
        """Return what a message asks to evaluate, None if it does not.

        Raises:
            WireError: it asks, in a form that cannot be read.
        """
        return cls.from_config(config) if cls.key in config else None

    @classmethod
    def _build(cls, plain: dict[str, Any]) -> Self:
        asked = cls(**plain)
        if not (0 <= asked.share < asked.shares and asked.eval_tokens >= 1 and asked.seconds > 0):
            raise ValueError(
                f"share {asked.share} of {asked.shares} of {asked.eval_tokens} tokens within {asked.seconds} s"
            )
        return asked


@dataclass(frozen=True)
class Evaluation(Note):
    """What a client measured.

    Attributes:
        run: id of the run, from the request, like `round`, `client`, `nonce` and `base_hash`.
        round: see `run`.
        client: see `run`.
        nonce: see `run`.
        base_hash: see `run`.
        nats: sum of the losses of all targets that have bytes.
        bytes: sum of their UTF-8 lengths; 0 where the text has fewer forward passes than there are shares.
        seconds: that it took, on the client's own clock.
        failure: why there are no sums, "" where there are.
    """

    key: ClassVar[str] = "nanofed.evaluation"

    run: str
    round: int
    client: str
    nonce: str
    base_hash: str
    nats: float
    bytes: int
    seconds: float
    failure: str

    @classmethod
    def _build(cls, plain: dict[str, Any]) -> Self:
        if len(plain["failure"]) > MAX_FAILURE:
            raise ValueError(f"failure has {len(plain['failure'])} characters, {MAX_FAILURE} are allowed")
        return cls(**plain)
