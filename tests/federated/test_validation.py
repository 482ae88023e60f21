from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from nanofed.data.packing import StreamState
from nanofed.data.rows import Row
from nanofed.data.streams import DataState
from nanofed.federated.server.validation import RefusedReply, Update, check_reply
from nanofed.federated.site.client import TrainerClient
from nanofed.federated.site.trainer import ClientFailure
from nanofed.federated.wire.codec import hash_arrays
from nanofed.federated.wire.messages import KEY
from nanofed.federated.wire.weight_transport import RoundWeights
from tests.federated import spoiled
from tests.federated.replies import STREAMS, instructions, raw, reply, report, request, sent, weights, with_json

SHARD = "shard_00000.parquet"


def check(message: Message) -> Update:
    return check_reply(message, instructions(), sent(), RoundWeights({}), streams=STREAMS, most_pending=1 << 12)


def test_an_honest_reply_is_accepted_as_it_is() -> None:
    update = check(reply())
    assert update.report == report()
    for array, theirs in zip(weights(1).values(), update.arrays, strict=True):
        assert (theirs == array).all()
    moved = [(weights(1)[name].astype(np.float64) - array).ravel() for name, array in weights().items()]
    assert np.linalg.norm(update.norms) == pytest.approx(float(np.linalg.norm(np.concatenate(moved))), rel=1e-12)


def changed(index: int, array: Any) -> list[Any]:
    arrays: list[Any] = list(weights(1).values())
    arrays[index] = array
    return arrays


def poisoned(value: float) -> Any:
    array = weights(1)["lm_head.weight"].copy()
    array[4, 3] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (changed(1, poisoned(float("nan"))), "lm_head.weight is not finite"),
        (changed(1, poisoned(float("inf"))), "lm_head.weight is not finite"),
        (changed(1, poisoned(float("-inf"))), "lm_head.weight is not finite"),
        (changed(0, np.zeros((4, 5), np.float32)), r"wte.weight has shape \(4, 5\)"),
        (changed(0, np.zeros((1, 4), np.float32)), r"wte.weight has shape \(1, 4\)"),
        (changed(2, np.zeros((), np.float32)), r"scale has shape \(\)"),
        (changed(2, np.zeros(1, np.float64)), "scale is float64"),
        (changed(2, np.zeros(1, np.float16)), "scale is float16"),
        (changed(2, np.zeros(1, np.int64)), "scale is int64"),
        (list(weights(1).values())[:2], "2 arrays arrived"),
        ([*weights(1).values(), np.zeros(1, np.float32)], "4 arrays arrived"),
        ([], "0 arrays arrived"),
    ],
)
def test_weights_that_do_not_fit_are_refused(arrays: list[Any], says: str) -> None:
    with pytest.raises(RefusedReply, match=says) as refused:
        check(reply(arrays, report(payload_hash=hash_arrays(arrays)).to_config()))
    assert refused.value.kind == ("not_finite" if "finite" in says else "malformed")


def test_weights_that_were_damaged_on_their_way_are_refused() -> None:
    with pytest.raises(RefusedReply, match="damaged on their way"):
        check(reply(changed(1, poisoned(0.5))))


def npz() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.npy", b"")
    return buffer.getvalue()


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin1")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"PK\x03\x04 no zip",
        npz(),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (5, 4)}"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (5, 4)}") + b"\x80\x04N.",
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-5, 4)}"),
        npy("__import__('os')"),
        npy("(" * 300),
        b"\x80\x04\x95pickle",
    ],
    ids=["empty", "text", "bad zip", "zip", "cut off", "pickle inside", "huge", "negative", "code", "nested", "pickle"],
)
def test_bytes_that_are_no_array_are_refused(data: bytes) -> None:
    with pytest.raises(RefusedReply):
        check(reply(raw(data)))


def test_another_serialization_is_refused() -> None:
    with pytest.raises(RefusedReply, match="cannot be read"):
        check(reply(raw(b"", stype="torch.pickle")))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run": "b" * 32}, "for run"),
        ({"round": 2}, "for round 2, not 3"),
        ({"client": "client-1"}, "for client 'client-1'"),
        ({"base_hash": "0" * 64}, "for base_hash"),
        ({"nonce": "0" * 32}, "for nonce"),
        ({"run": "x" * 1_000_000}, "for run"),
        ({"steps": 0, "tokens": 0}, "claims 0 steps"),
        ({"steps": -1, "tokens": -64}, "claims -1 steps"),
        ({"steps": 5, "tokens": 320}, "claims 5 steps, of 4 at most"),
        ({"steps": True, "tokens": 64}, "steps is True"),
        ({"tokens": 193}, "193 tokens for 3 steps of 64"),
        ({"seconds": -0.5}, "took -0.5 s"),
        ({"ahead": 1}, "took 1 of 3 steps before it had the weights"),  # the round has no overlap
        ({"ahead": -1}, "took -1 of 3 steps"),
        ({"seconds": float("nan")}, "should be a finite number"),
        ({"loss_last": float("inf")}, "should be a finite number"),
        ({"seconds": 1e-300}, "its training took 1e-300 s for 3 steps"),
        ({"seconds": 1e300}, r"its training took 1e\+300 s"),
        ({"loss_last": 1e300}, r"its loss_last is 1e\+300 nats a token"),
        ({"loss_first": -1.0}, "its loss_first is -1.0 nats a token"),
    ],
)
def test_a_report_of_something_else_is_refused(changes: dict[str, Any], says: str) -> None:
    plain = {**json.loads(report().to_config()[KEY]), **changes}
    with pytest.raises(RefusedReply, match=says) as refused:
        check(with_json(json.dumps(plain)))
    assert len(str(refused.value)) <= 500
    words = str(refused.value).split()
    repeated = {"run": "foreign", "client": "foreign", "round": "stale", "base_hash": "stale", "nonce": "stale"}
    kind = repeated[words[3]] if words[:3] == ["it", "is", "for"] else "malformed" if words[0] == "a" else "tokens"
    assert refused.value.kind == kind


def streams(**changes: StreamState) -> DataState:
    at = {**report().data.streams, **{int(name[1:]): state for name, state in changes.items()}}
    return DataState(12, at)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (streams(_0=StreamState(Row(1, SHARD, 25))), "stream 0 stands at .*outside its lease"),
        (streams(_0=StreamState(Row(1, SHARD, 7))), "stream 0 stands at"),
        (streams(_0=StreamState(Row(0, SHARD, 12))), "stream 0 stands at"),  # the same rows, another epoch
        (streams(_0=StreamState(Row(1, "shard_00001.parquet", 12))), "stream 0 stands at"),
        (streams(_1=StreamState(Row(0, "shard_00002.parquet", 11))), "stream 1 stands at"),
        (streams(_0=StreamState(Row(1, SHARD, 12), (Row(1, SHARD, 24),))), "stream 0 holds"),
        (streams(_0=StreamState(Row(1, SHARD, 12), (Row(0, SHARD, 8),))), "stream 0 holds"),
        (streams(_0=StreamState(Row(1, SHARD, 12), (Row(1, SHARD, 9),))), "stream 0 holds"),  # a row of stream 1
        (streams(_0=StreamState(Row(1, SHARD, 12), 5000 * (Row(1, SHARD, 8),))), "stream 0 holds 5000 documents"),
        (streams(_0=StreamState(Row(1, SHARD, 12), (), 1 << 50)), "tokens of the first used up"),
        (streams(_0=StreamState(Row(1, SHARD, 12), 2 * (Row(1, SHARD, 8),))), "stream 0 holds a document twice"),
        (streams(_2=StreamState()), r"streams \[0, 1, 2\], not on 2"),
        (DataState(12, {0: StreamState()}), r"streams \[0\], not on 2"),
        (DataState(12, {}), r"streams \[\], not on 2"),
    ],
)
def test_positions_outside_the_lease_are_refused(data: DataState, says: str) -> None:
    with pytest.raises(RefusedReply, match=says):
        check(reply(metrics=report(data=data).to_config()))


def test_positions_at_the_ends_of_the_lease_are_not() -> None:
    for row in (8, 24):
        asked = report(data=streams(_0=StreamState(Row(1, SHARD, row))))
        assert check(reply(metrics=asked.to_config())).report == asked
    fresh = report(data=streams(_0=StreamState()))
    assert check(reply(metrics=fresh.to_config())).report == fresh


@pytest.mark.parametrize(
    "position", [[1, SHARD, "12"], [1, SHARD, 12.5], [1, SHARD, None], [True, SHARD, 12], [1, [SHARD], 12], [1, SHARD]]
)
def test_positions_of_another_kind_are_refused(position: list[Any]) -> None:
    plain = json.loads(report().to_config()[KEY])
    for stream in (0, 1):
        for where in (1, 2):
            content = json.loads(json.dumps(plain))
            content["data"]["streams"][stream][where] = [position] if where == 2 else position
            with pytest.raises(RefusedReply, match="cannot be read: data is"):
                check(with_json(json.dumps(content)))


def test_an_error_and_an_empty_reply_are_refused() -> None:
    with pytest.raises(RefusedReply, match="the client failed: it burns"):
        check(Message(Error(1, "it burns"), reply_to=request()))
    with pytest.raises(RefusedReply, match="a Report must be"):
        check(Message(RecordDict(), reply_to=request()))
    with pytest.raises(RefusedReply, match="no weights in it"):
        content = RecordDict({"fitres.metrics": ConfigRecord(report().to_config())})
        check(Message(content, reply_to=request()))


# --- fuzz


def test_no_corruption_reaches_the_model_and_none_raises_anything_else(count: Callable[[int, int], int]) -> None:
    number, harmless = count(300, 10_000), 0
    for seed in range(number):
        spoil, message = spoiled.SPOILS[seed % len(spoiled.SPOILS)], reply()
        spoil(message, random.Random(seed))
        try:
            update = check(message)
        except RefusedReply as refusal:
            assert 0 < len(str(refusal)) <= 500
            continue
        # Accepted: then it is well formed in all that is merged, and says something that an honest client might say.
        harmless += 1
        assert spoil not in (spoiled.values, spoiled.shapes), seed
        for (name, array), theirs in zip(weights(1).items(), update.arrays, strict=True):
            assert (theirs == array).all(), (seed, name)
        honest = report()
        for field in ("run", "round", "client", "nonce", "base_hash", "payload_hash", "steps", "tokens"):
            assert getattr(update.report, field) == getattr(honest, field), (seed, field)
            assert type(getattr(update.report, field)) is type(getattr(honest, field))
    assert harmless < number / 5, f"{harmless} of {number}"


def test_a_lease_that_was_too_short_is_told_from_other_failures() -> None:
    class Trainer:
        def fit(self, arrays: Any, asked: Any) -> Any:
            raise ClientFailure("lease", "no text")

    asked = instructions()
    client = TrainerClient(cast(Any, Trainer()), asked.client)
    _, _, metrics = client.fit([], asked.to_config())
    with pytest.raises(RefusedReply, match="no text") as refused:
        check(reply(metrics=metrics))
    assert refused.value.kind == "lease"
