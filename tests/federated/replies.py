"""Instructions and the reply of an honest client to them, small enough to be corrupted by the thousand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from nanofed.data.packing import StreamState
from nanofed.data.rows import Row, RowRange
from nanofed.data.streams import DataState
from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.wire.codec import CODECS, hash_arrays
from nanofed.federated.wire.messages import KEY, Instructions, Report

STREAMS = 2


def weights(seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    shapes = {"transformer.wte.weight": (5, 4), "lm_head.weight": (5, 4), "scale": (1,)}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def sent(up: str = "fp32") -> SentWeights:
    return SentWeights(weights(), list(weights().values()), CODECS["fp32"], CODECS[up])


def instructions(**changes: Any) -> Instructions:
    values: dict[str, Any] = {
        "run": "a" * 32,
        "round": 3,
        "client": "client-0",
        "base_hash": hash_arrays(list(weights().values())),
        "nonce": "c" * 32,
        "lease": (RowRange("shard_00000.parquet", 8, 24, 1), RowRange("shard_00002.parquet", 0, 10, 0)),
        "data": state(9),
    }
    values |= {"down_codec": "fp32", "changed_from": "", "up_codec": "fp32"}
    values |= {"max_steps": 4, "seconds": None, "deadline_seconds": None}
    values |= {"participants": 2, "batch_tokens": 64, "clock_step": 8, "clock_tokens": 1024, "horizon_tokens": 8192}
    values["overlap"] = False
    return Instructions(**{**values, **changes})


def state(row: int) -> DataState:
    shard = "shard_00000.parquet"
    return DataState(
        12,
        {
            0: StreamState(Row(1, shard, row), (Row(1, shard, 8),), 5),
            1: StreamState(Row(0, "shard_00002.parquet", 10), (Row(0, "shard_00002.parquet", 9),), 0),
        },
    )


def report(**changes: Any) -> Report:
    asked = instructions()
    values: dict[str, Any] = {name: getattr(asked, name) for name in ("run", "round", "client", "nonce", "base_hash")}
    values |= {"payload_hash": hash_arrays(list(weights(1).values())), "data": state(13), "steps": 3, "tokens": 192}
    values |= {"seconds": 1.5, "loss_first": 5.5, "loss_last": 5.0, "exhausted": False, "unwritten": False, "ahead": 0}
    return Report(**{**values, **changes})


def request() -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    message = Message(RecordDict(), 1, MessageType.TRAIN)
    message.metadata.__dict__["_message_id"] = "m"
    return message


def reply(
    arrays: Iterable[npt.NDArray[Any]] | ArrayRecord | None = None, metrics: Mapping[str, Any] | None = None
) -> Message:
    """Build what Flower makes of a NumPyClient's answer."""
    if not isinstance(arrays, ArrayRecord):
        arrays = ArrayRecord([np.asarray(a) for a in (weights(1).values() if arrays is None else arrays)])
    content = RecordDict(
        {
            "fitres.parameters": arrays,
            "fitres.num_examples": MetricRecord({"num_examples": 192}),
            "fitres.metrics": ConfigRecord(report().to_config() if metrics is None else dict(metrics)),
        }
    )
    return Message(content, reply_to=request())


def raw(data: bytes, stype: str = "numpy.ndarray") -> ArrayRecord:
    """Weights of which the first is any bytes."""
    arrays = {str(n): Array(array) for n, array in enumerate(weights(1).values())}
    first = next(iter(weights().values()))
    arrays["0"] = Array(dtype=str(first.dtype), shape=first.shape, stype=stype, data=data)
    return ArrayRecord(arrays)


def with_json(text: Any) -> Message:
    return reply(metrics={KEY: text})
