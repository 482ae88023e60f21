"""What server and site say to each other when sites measure the global weights on text of their own.

A request to evaluate rides with a round: beside the instructions, in the message that brings the weights anyway, so that a
site with a slow link does not take a second copy of the model for it. Only the last weights of a run, after which no round
comes, are sent to be evaluated alone. The answer is sums, nats and bytes: sums of several sites pool exactly, means do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from nanofed.federated.wire.messages import Int, RoundMessage

MAX_FAILURE = 500  # characters


@dataclass(frozen=True)
class Evaluate(RoundMessage):
    """What a client is to measure.

    The text is that of the server's own evaluation, of the client's validation shard: its first `eval_tokens` targets in document
    order. Forward pass f of it (`nanofed.data.validation`) is this client's where f mod `shares` is `share`. So shares of one
    shard are disjoint and together all of it, and a pass gives the same sums wherever it is computed on the same hardware.

    Attributes:
        down_codec: codec of the arrays that go with the message and are to be measured.
        eval_tokens: targets of the text, all shares together.
        share: the number of this client's share, from 0.
        shares: how many shares there are.
        seconds: seconds after which to give it up, on the client's own clock.
    """

    key: ClassVar[str] = "nanofed.evaluate"

    down_codec: str
    eval_tokens: Int
    share: Int
    shares: Int
    seconds: float

    @classmethod
    def asked_in(cls, config: Mapping[str, Any]) -> Self | None:
        """Return what a message asks to evaluate, None if it does not.

        Raises:
            WireError: it asks, in a form that cannot be read.
        """
        return cls.from_config(config) if cls.key in config else None

    def check(self) -> None:
        """Refuse a share that there is not."""
        if not (0 <= self.share < self.shares and self.eval_tokens >= 1 and self.seconds > 0):
            raise ValueError(
                f"share {self.share} of {self.shares} of {self.eval_tokens} tokens within {self.seconds} s"
            )


@dataclass(frozen=True)
class Evaluation(RoundMessage):
    """What a client measured.

    Attributes:
        nats: sum of the losses of all targets that have bytes.
        bytes: sum of their UTF-8 lengths; 0 where the text has fewer forward passes than there are shares.
        seconds: how long it took, on the client's own clock.
        failure: why there are no sums, "" where there are.
    """

    key: ClassVar[str] = "nanofed.evaluation"

    nats: float
    bytes: Int
    seconds: float
    failure: str

    def check(self) -> None:
        """Refuse a failure of too many words."""
        if len(self.failure) > MAX_FAILURE:
            raise ValueError(f"failure has {len(self.failure)} characters, {MAX_FAILURE} are allowed")
