"""How the updates of a round become the next global weights: pure mathematics, which knows no messages and no Flower.

`update` reads what a client has changed, `norm_guard` says whether it is too long, `mean` and `robust` make one pseudo-gradient
of all of them, and `outer` steps the global weights along it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nanofed.federated.aggregation.aggregator import Aggregator
from nanofed.federated.aggregation.mean import Mean
from nanofed.federated.aggregation.robust import Median, TrimmedMean
from nanofed.federated.aggregation.update import SentWeights

Method = Literal["mean", "median", "trimmed_mean"]


def make_aggregator(method: Method, sent: SentWeights, spool: Path, *, trim: float = 0.2) -> Aggregator:
    """Return the aggregator of one round.

    Args:
        method: `mean`, `median` or `trimmed_mean`.
        sent: the weights that the round was sent.
        spool: the folder for replies that wait on disk: all of them for `median` and `trimmed_mean`, and for `mean` those that
            are unusually long. Files that an earlier round left there are removed.
        trim: for `trimmed_mean`, the share of the clients that is cut off on each side, in [0, 0.5).

    Raises:
        NanofedError: the spool folder cannot be used.
    """
    if method == "mean":
        return Mean(sent, spool)
    return Median(sent, spool) if method == "median" else TrimmedMean(sent, spool, trim)
