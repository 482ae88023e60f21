"""Nothing unchecked enters the model: a reply is what was asked for, or it is refused with a reason."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from nanofed.data.rows import Row, RowRange
from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.server.events import Kind
from nanofed.federated.wire.codec import Arrays, WireError, hash_arrays
from nanofed.federated.wire.messages import Failure, Instructions, Report, RoundMessage
from nanofed.federated.wire.plain_text import plain
from nanofed.federated.wire.weight_transport import RoundWeights

ReplyMetrics = Mapping[str, Any]  # all that a client says beside weights

MAX_REASON = 500  # characters: a reply may hold what it likes, the log should not
LEAST_STEP_SECONDS = 1e-6  # of training: no optimizer step takes less
MAX_SECONDS = 30 * 86400.0  # of training in a round
MAX_LOSS = 1000.0  # nats a token: soft-capped logits give less than 50
MAX_DATA_ROWS = 1 << 53  # that a client says it has made, over all its rounds
MAX_OFFSET = 1 << 40  # tokens used up of one document
# What a report has to repeat, and what it is if it does not.
REPEATED: Mapping[str, Kind] = {
    "run": "foreign",
    "client": "foreign",
    "round": "stale",
    "base_hash": "stale",
    "nonce": "stale",
}


class RefusedReply(Exception):
    """A reply that may not be merged; the message says why, and `kind` what sort of reason it is."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(plain(reason, MAX_REASON))
        self.kind = kind


@dataclass(frozen=True)
class Update:
    """An accepted reply."""

    arrays: Arrays  # the weights, in the up-link's codec
    report: Report  # what the client says of its training
    norms: Sequence[float]  # the L2 norm of what the arrays change in every weight
    metrics: ReplyMetrics  # all that the client says beside weights, of which only the report is checked


def check_reply(
    reply: Message,
    instructions: Instructions,
    sent: SentWeights,
    round_weights: RoundWeights,
    *,
    streams: int,
    most_pending: int,
) -> Update:
    """Return the update in a reply to `instructions`.

    Args:
        reply: The message that came back.
        instructions: What the client was asked to do.
        sent: The weights that the round was sent.
        round_weights: The weights on their way, from which the reply's arrays are taken.
        streams: The number of streams of every client.
        most_pending: The documents that a stream's packer may hold.

    Raises:
        RefusedReply: The reply is an error, of other names, shapes or dtypes, not finite, of another run, round, client, nonce or
            base, has figures out of their range, or streams outside the lease.
    """
    if reply.has_error():
        raise RefusedReply("failed", f"the client failed: {reply.error.reason}")
    try:
        metrics: ReplyMetrics = reply.content.config_records.get("fitres.metrics", {})
        if Failure.key in metrics:
            failure = Failure.from_config(metrics)
            check_repeated(failure, instructions)
            raise RefusedReply(failure.kind, failure.reason)
        report = Report.from_config(metrics)
        arrays = round_weights.take(instructions.client, reply, sent.up, sent.weights)
        sent.up.check(arrays, sent.weights)
    except RefusedReply:
        raise
    except Exception as error:  # foreign bytes: NumPy's reader raises a dozen kinds
        reason = str(error) if isinstance(error, WireError) else f"it cannot be read: {error!r}"
        raise RefusedReply("malformed", reason) from error
    check_repeated(report, instructions)
    _check_figures(report, instructions)
    _check_positions(report, instructions, streams, most_pending)
    if hash_arrays(arrays) != report.payload_hash:
        raise RefusedReply("damaged", "its weights are not the ones that it announces: they were damaged on their way")
    norms = sent.update_norms(arrays)
    for name, norm in zip(sent.weights, norms, strict=True):
        if not math.isfinite(norm):
            raise RefusedReply("not_finite", f"{name} is not finite")
    return Update(arrays, report, norms, metrics)


def check_repeated(said: RoundMessage, asked: RoundMessage, kind: Kind | None = None) -> None:
    """Refuse an answer that does not repeat whose message it answers, as `kind`, by default as `REPEATED` says."""
    for name, own in REPEATED.items():
        there, here = getattr(said, name), getattr(asked, name)
        if there != here:
            raise RefusedReply(kind or own, f"it is for {name} {there!r}, not {here!r}")


def _check_figures(report: Report, instructions: Instructions) -> None:
    """Refuse a figure of a report that no training of these instructions can have."""
    steps = report.steps
    if not 1 <= steps <= instructions.max_steps:
        raise RefusedReply("tokens", f"it claims {steps} steps, of {instructions.max_steps} at most")
    # A client whose rows were given back, as those of one that was silent are, has nothing to go on from.
    if not 0 <= report.ahead <= (steps if instructions.overlap and instructions.data is not None else 0):
        raise RefusedReply(
            "tokens", f"it claims that it took {report.ahead} of {steps} steps before it had the weights"
        )
    if report.tokens != steps * instructions.batch_tokens:
        claim = f"it claims {report.tokens} tokens for {steps} steps of {instructions.batch_tokens}"
        raise RefusedReply("tokens", claim)
    if not steps * LEAST_STEP_SECONDS <= report.seconds <= MAX_SECONDS:
        raise RefusedReply("tokens", f"its training took {report.seconds} s for {steps} steps")
    for name in ("loss_first", "loss_last"):
        if not 0 <= getattr(report, name) <= MAX_LOSS:
            raise RefusedReply("tokens", f"its {name} is {getattr(report, name)} nats a token, of {MAX_LOSS:g} at most")
    if report.data.rows > MAX_DATA_ROWS:
        raise RefusedReply("tokens", f"it claims {report.data.rows} rows of tokens, of {MAX_DATA_ROWS} at most")


def _check_positions(report: Report, instructions: Instructions, streams: int, most_pending: int) -> None:
    """Refuse other streams than there are, and data positions outside the lease: they would commit rows of others."""
    if set(report.data.streams) != set(range(streams)):
        listed = sorted(report.data.streams)[:64]
        raise RefusedReply("position", f"it reports on the streams {listed}, not on {streams} of them")

    lease = _Lease(instructions.lease)
    for stream, at in report.data.streams.items():
        if at.position is not None and not lease.holds(at.position, end=True):
            raise RefusedReply("position", f"stream {stream} stands at {tuple(at.position)}, outside its lease")
        if len(at.pending) > most_pending or at.offset > MAX_OFFSET:
            raise RefusedReply(
                "position",
                f"stream {stream} holds {len(at.pending)} documents, {at.offset} tokens of the first used up; its packer holds "
                f"{most_pending} at most",
            )
        if len(set(at.pending)) != len(at.pending):
            raise RefusedReply("position", f"stream {stream} holds a document twice")
        for row in at.pending:
            if row.row % streams != stream or not lease.holds(row):
                raise RefusedReply("position", f"stream {stream} holds {tuple(row)}, which is not its own")


class _Lease:
    """Tells whether rows are of a lease, of however many ranges that is."""

    def __init__(self, ranges: Sequence[RowRange]) -> None:
        self._parts: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
        for part in ranges:
            self._parts[part.epoch, part.shard].append((part.start, part.stop))
        for parts in self._parts.values():
            parts.sort()  # ranges of a lease do not overlap

    def holds(self, row: Row, *, end: bool = False) -> bool:
        """Tell whether a row is of the lease, or with `end` behind the last row of one of its ranges."""
        parts = self._parts.get((row.epoch, row.shard), [])
        index = bisect.bisect_right(parts, (row.row, math.inf)) - 1
        return index >= 0 and row.row < parts[index][1] + end
