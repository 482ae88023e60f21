"""Nothing unchecked enters the model: a reply is what was asked for, or it is refused with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from nanofed.data.rows import Row
from nanofed.federated.server.events import Kind
from nanofed.federated.server.updates import update_norm
from nanofed.federated.wire.codec import Arrays, Codec, Weights, WireError, hash_arrays, payload_bytes
from nanofed.federated.wire.messages import UNWRITTEN, Instructions, Report
from nanofed.federated.wire.plain import plain

MAX_REASON = 500  # characters: a reply may hold what it likes, the log should not
# What a report has to repeat, and what it is if it does not.
REPEATED: Mapping[str, Kind] = {
    "run": "foreign",
    "client": "foreign",
    "round": "stale",
    "base_hash": "stale",
    "nonce": "stale",
}


class Refused(Exception):
    """A reply that may not be merged; the message says why, and `kind` what sort of reason it is."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(plain(reason, MAX_REASON))
        self.kind = kind


@dataclass(frozen=True)
class Sent:
    """What the clients of a round were sent, and in which form they answer.

    Attributes:
        weights: the global weights: names and shapes.
        payload: what went down, `down.encode(weights)`.
        down: its codec.
        up: the codec of the replies.
    """

    weights: Weights
    payload: Arrays
    down: Codec
    up: Codec


@dataclass(frozen=True)
class Update:
    """An accepted reply: arrays in the up-link's codec, and the L2 norm of what they change.

    `unwritten`: the site's disk has not taken its optimizer state.
    """

    arrays: Arrays
    report: Report
    payload_bytes: int
    norm: float
    unwritten: bool = False


def check_reply(
    reply: Message,
    instructions: Instructions,
    sent: Sent,
    streams: int,
    take: Callable[[Message], Arrays],
) -> Update:
    """Return the update in a reply to `instructions`.

    Args:
        reply: what came back.
        instructions: what was asked.
        sent: the weights that went with it.
        streams: streams of every client.
        take: returns the arrays that belong to a reply.

    Raises:
        Refused: an error at the client; names, shapes or dtypes that differ; values that are not finite; another run, round,
            client, nonce or base; more steps or tokens than were asked for; streams outside the lease.
    """
    if reply.has_error():
        raise Refused("failed", f"the client failed: {reply.error.reason}")
    try:
        metrics = reply.content.config_records.get("fitres.metrics")
        report = Report.from_config(metrics)
        unwritten = metrics is not None and bool(metrics.get(UNWRITTEN))
        arrays = take(reply)
        payload = payload_bytes(arrays)
        sent.up.check(arrays, sent.weights)
    except Exception as error:  # foreign bytes: NumPy's reader raises a dozen kinds
        reason = str(error) if isinstance(error, WireError) else f"it cannot be read: {error!r}"
        raise Refused("malformed", reason) from error
    for name, kind in REPEATED.items():
        if getattr(report, name) != getattr(instructions, name):
            raise Refused(kind, f"it is for {name} {getattr(report, name)!r}, not {getattr(instructions, name)!r}")
    steps = report.steps
    if not 1 <= steps <= instructions.max_steps:
        raise Refused("tokens", f"it claims {steps} steps, of {instructions.max_steps} at most")
    if report.tokens != steps * instructions.batch_tokens:
        raise Refused("tokens", f"it claims {report.tokens} tokens for {steps} steps of {instructions.batch_tokens}")
    if report.seconds < 0:
        raise Refused("tokens", f"its training took {report.seconds} s")
    _check_positions(report, instructions, streams)
    if hash_arrays(arrays) != report.payload_hash:
        raise Refused("damaged", "its weights are not the ones that it announces: they were damaged on their way")
    norm = update_norm(arrays, sent.weights, sent.payload, sent.down, sent.up)
    if not math.isfinite(norm):
        raise Refused("not_finite", f"{_not_finite(arrays, sent)} is not finite")
    return Update(arrays, report, payload, norm, unwritten)


def _not_finite(arrays: Arrays, sent: Sent) -> str:
    decoded = sent.up.decode(arrays, sent.weights)
    return next((name for name, array in decoded.items() if not np.isfinite(array).all()), "the norm of the update")


def _check_positions(report: Report, instructions: Instructions, streams: int) -> None:
    """Refuse other streams than there are, and data positions outside the lease: they would commit rows of others."""
    if set(report.data.streams) != set(range(streams)):
        listed = sorted(report.data.streams)[:64]
        raise Refused("position", f"it reports on the streams {listed}, not on {streams} of them")

    def inside(row: Row, past_the_end: int) -> bool:
        return any(
            (part.epoch, part.shard) == (row.epoch, row.shard) and part.start <= row.row < part.stop + past_the_end
            for part in instructions.lease
        )

    for stream, at in report.data.streams.items():
        if at.position is not None and not inside(at.position, 1):
            raise Refused("position", f"stream {stream} stands at {tuple(at.position)}, outside its lease")
        for row in at.pending:
            if row.row % streams != stream or not inside(row, 0):
                raise Refused("position", f"stream {stream} holds {tuple(row)}, which is not its own")
