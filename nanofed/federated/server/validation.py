"""Nothing unchecked enters the model: a reply is what was asked for, or it is refused with a reason."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from nanofed.data.rows import Row
from nanofed.federated.wire.codec import CODECS, Array, Weights, WireError, hash_arrays
from nanofed.federated.wire.messages import Instructions, Report

MAX_REASON = 500  # characters: a reply may hold what it likes, the log should not


class Refused(Exception):
    """A reply that may not be merged; the message says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason[:MAX_REASON])


@dataclass(frozen=True)
class Update:
    """An accepted reply."""

    weights: dict[str, Array]
    report: Report
    payload_bytes: int


def check_reply(reply: Message, instructions: Instructions, weights: Weights, streams: int) -> Update:
    """Return the update in a reply to `instructions`.

    Args:
        reply: what came back.
        instructions: what was asked.
        weights: the global weights that were sent: names and shapes.
        streams: streams of every client.

    Raises:
        Refused: an error at the client; names, shapes or dtypes that differ; values that are not finite; another run, round,
            client or base; more steps or tokens than were asked for; streams outside the lease.
    """
    if reply.has_error():
        raise Refused(f"the client failed: {reply.error.reason}")
    try:
        report = Report.from_config(reply.content.config_records.get("fitres.metrics"))
        record = reply.content.array_records.get("fitres.parameters")
        if record is None:
            raise WireError("there are no weights in it")
        # Not with `to_numpy_ndarrays(keep_input=False)`: it collects garbage each time, 0.1 s and more a reply.
        arrays = [record.pop(name).numpy() for name in list(record)]
        payload = sum(array.nbytes for array in arrays)
        local = CODECS[instructions.up_codec].decode(arrays, weights)
    except Exception as error:  # foreign bytes: NumPy's reader raises a dozen kinds
        raise Refused(str(error) if isinstance(error, WireError) else f"it cannot be read: {error!r}") from error
    for name in ("run", "round", "client", "nonce", "base_hash"):
        if getattr(report, name) != getattr(instructions, name):
            raise Refused(f"it is for {name} {getattr(report, name)!r}, not {getattr(instructions, name)!r}")
    steps = report.steps
    if not 1 <= steps <= instructions.max_steps:
        raise Refused(f"it claims {steps} steps, of {instructions.max_steps} at most")
    if report.tokens != steps * instructions.batch_tokens:
        raise Refused(f"it claims {report.tokens} tokens for {steps} steps of {instructions.batch_tokens}")
    if report.seconds < 0:
        raise Refused(f"its training took {report.seconds} s")
    _check_positions(report, instructions, streams)
    if hash_arrays(arrays) != report.payload_hash:
        raise Refused("its weights are not the ones that it announces: they were damaged on their way")
    for name, array in local.items():
        if not np.isfinite(array).all():
            raise Refused(f"{name} is not finite")
    return Update(local, report, payload)


def _check_positions(report: Report, instructions: Instructions, streams: int) -> None:
    """Refuse other streams than there are, and data positions outside the lease: they would commit rows of others."""
    if set(report.data.streams) != set(range(streams)):
        raise Refused(f"it reports on the streams {sorted(report.data.streams)[:64]}, not on {streams} of them")

    def inside(row: Row, past_the_end: int) -> bool:
        return any(
            (part.epoch, part.shard) == (row.epoch, row.shard) and part.start <= row.row < part.stop + past_the_end
            for part in instructions.lease
        )

    for stream, at in report.data.streams.items():
        if at.position is not None and not inside(at.position, 1):
            raise Refused(f"stream {stream} stands at {tuple(at.position)}, outside its lease")
        for row in at.pending:
            if row.row % streams != stream or not inside(row, 0):
                raise Refused(f"stream {stream} holds {tuple(row)}, which is not its own")
