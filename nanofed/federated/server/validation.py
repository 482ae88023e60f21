"""Nothing unchecked enters the model: a reply is what was asked for, or it is refused with a reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from nanofed.data.streams import DataState
from nanofed.federated.wire.codec import CODECS, Array, Weights, WireError
from nanofed.federated.wire.messages import Instructions, Report


class Refused(Exception):
    """A reply that may not be merged; the message says why."""


@dataclass(frozen=True)
class Update:
    """An accepted reply."""

    weights: dict[str, Array]
    report: Report
    payload_bytes: int


def check_reply(reply: Message, instructions: Instructions, weights: Weights) -> Update:
    """Return the update in a reply to `instructions`.

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
        arrays = record.to_numpy_ndarrays(keep_input=False)
        payload = sum(array.nbytes for array in arrays)
        local = CODECS[instructions.codec].decode(arrays, weights)
    except (WireError, ValueError, TypeError, EOFError, OSError) as error:
        raise Refused(str(error)) from error
    for name in ("run", "round", "client", "base_hash"):
        if getattr(report, name) != getattr(instructions, name):
            raise Refused(f"it is for {name} {getattr(report, name)!r}, not {getattr(instructions, name)!r}")
    steps = report.steps
    if type(steps) is not int or not 1 <= steps <= instructions.max_steps:
        raise Refused(f"it claims {steps!r} steps, of {instructions.max_steps} at most")
    if report.tokens != steps * instructions.batch_tokens:
        raise Refused(f"it claims {report.tokens!r} tokens for {steps} steps of {instructions.batch_tokens}")
    for name in ("seconds", "loss_first", "loss_last"):
        value = getattr(report, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise Refused(f"its {name} is {value!r}")
    _check_positions(report.data, instructions)
    for name, array in local.items():
        if not np.isfinite(array).all():
            raise Refused(f"{name} is not finite")
    return Update(local, report, payload)


def _check_positions(state: DataState, instructions: Instructions) -> None:
    """Refuse a data position outside the lease: it would commit rows of others."""
    for stream, at in state.streams.items():
        position = at.position
        if position is None:
            continue
        inside = any(
            (part.epoch, part.shard) == (position.epoch, position.shard) and part.start <= position.row <= part.stop
            for part in instructions.lease
        )
        if not inside:
            raise Refused(f"stream {stream} stands at {tuple(position)}, outside its lease")
