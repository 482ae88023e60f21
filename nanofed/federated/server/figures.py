"""What one round came to, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from nanofed.federated.aggregation.aggregator import PseudoGradient
from nanofed.federated.aggregation.norm_guard import Length
from nanofed.federated.server.validation import Update
from nanofed.federated.wire.blocks import l2_norm


@dataclass
class Merged:
    """A client's part in a round: its reply without the arrays, its share in the mean, and what its norm was scaled by."""

    update: Update
    length: Length
    weight: float
    scale: float
    seconds: float  # from dispatch until its answer was here, less those in which it measured the weights for us
    held: bool = False  # until the others of its round are known
    cosine: float | None = None  # of its update with the merged one


@dataclass
class RoundFigures:
    """What one round came to.

    Attributes:
        round: its number.
        asked: clients that were sent it.
        merged: client -> its part.
        refused: answers that were not merged.
        silent: clients that gave none.
        bytes_down: on the wire, without framing.
        wait: seconds until there was a quorum.
        exchange: seconds from dispatch to the last answer.
        merge: seconds of folding, of the outer step and of the commit.
        merged_norm: L2 norm of the pseudo-gradient.
    """

    round: int
    asked: int
    merged: dict[str, Merged] = field(default_factory=dict)
    refused: int = 0
    silent: int = 0
    bytes_down: int = 0
    wait: float = 0.0
    exchange: float = 0.0
    merge: float = 0.0
    merged_norm: float = 0.0

    def take(self, gradient: PseudoGradient, cosines: Mapping[str, float]) -> None:
        """Measure the pseudo-gradient of the round."""
        self.merged_norm = l2_norm(list(gradient.values()))
        for client, cosine in cosines.items():
            self.merged[client].cosine = cosine

    @property
    def norms(self) -> list[float]:
        """L2 norms of the updates as they were folded in."""
        return [part.update.norm * part.scale for part in self.merged.values()]

    def train_seconds(self) -> float:
        """Return the longest training: clients train at the same time, each on its own clock."""
        return max(part.update.report.seconds for part in self.merged.values())

    def scalars(self) -> dict[str, float]:
        """Return the scalars of the round by tag."""
        parts, norms = list(self.merged.values()), self.norms
        cosines = [part.cosine for part in parts if part.cosine is not None]
        mean_norm = math.fsum(norms) / len(norms)
        out = {
            "fed/round": self.round,
            "fed/clients_asked": self.asked,
            "fed/clients_merged": len(parts),
            "fed/clients_late": self.silent,
            "fed/clients_refused": self.refused,
            "fed/steps_mean": math.fsum(part.update.report.steps for part in parts) / len(parts),
            "fed/bytes_up": sum(part.update.payload_bytes for part in parts),
            "fed/bytes_down": self.bytes_down,
            "fed/wait_seconds": self.wait,
            "fed/train_seconds": self.train_seconds(),
            "fed/transfer_seconds": max(0.0, *(part.seconds - part.update.report.seconds for part in parts)),
            "fed/merge_seconds": self.merge,
            "fed/round_seconds": self.wait + self.exchange + self.merge,
            "fed/update_norm_mean": mean_norm,
            "fed/update_norm_max": max(norms),
            "fed/update_norm_merged": self.merged_norm,
            # 1 where all clients move alike, 1/sqrt(n) where their updates have nothing in common.
            "fed/drift": self.merged_norm / mean_norm if mean_norm else 0.0,
        }
        if cosines:
            out |= {
                "fed/cosine_to_merged_mean": math.fsum(cosines) / len(cosines),
                "fed/cosine_to_merged_min": min(cosines),
            }
        if (cosine := self.cosine_between_clients()) is not None:
            out["fed/cosine_between_clients"] = cosine
        return out

    def cosine_between_clients(self) -> float | None:
        """Return the mean cosine of pairs of updates, weighted by their lengths and shares; None for a single client.

        From the norms alone, of the updates and of their weighted mean: |sum w u|^2 is sum w^2 |u|^2 plus the sum of
        w_i w_j <u_i, u_j> over pairs. It holds where the merge is the mean.
        """
        lengths = [part.weight * norm for part, norm in zip(self.merged.values(), self.norms, strict=True)]
        own = math.fsum(length**2 for length in lengths)
        largest = math.fsum(lengths) ** 2 - own
        if len(lengths) < 2 or largest <= 0:
            return None
        total = math.fsum(part.weight for part in self.merged.values())
        return max(-1.0, min(1.0, ((self.merged_norm * total) ** 2 - own) / largest))
