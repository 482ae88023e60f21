"""Replies that are wrong in one of a thousand ways: what an honest client has answered is changed in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from nanofed.federated.wire.codec import hash_arrays
from nanofed.federated.wire.messages import KEY

PARAMETERS, METRICS = "fitres.parameters", "fitres.metrics"


def report_in(reply: Message) -> str:
    return str(reply.content.config_records[METRICS][KEY])


def say(reply: Message, text: str) -> None:
    reply.content[METRICS] = ConfigRecord({KEY: text})


def report(reply: Message, random: Random) -> None:
    """One value anywhere in the report becomes something else."""
    plain = node = json.loads(report_in(reply))
    while True:
        key = random.choice(list(node) if isinstance(node, dict) else list(range(len(node))))
        if not (isinstance(node[key], dict | list) and node[key] and random.random() < 0.8):
            break
        node = node[key]
    old = node[key]
    garbage: list[Any] = [None, True, "", "3", -1, 2.5, [], {}, 10**25, 1e300, float("nan"), "é\0", "x" * 10_000]
    garbage += [[old], {"a": old}, [[None]]]
    if isinstance(old, int) and not isinstance(old, bool):
        garbage += [old + 1, old + 1000, -old - 1, float(old), str(old), old * 2**40 + 1]
    if isinstance(old, str):
        garbage += [old + "x", old[1:], old.upper()]
    if random.random() < 0.2 and isinstance(node, dict):
        del node[key]
    else:
        node[key] = random.choice([value for value in garbage if value != old or type(value) is not type(old)])
    say(reply, json.dumps(plain))


def text(reply: Message, random: Random) -> None:
    """The report's text is cut, or a character of it is another one."""
    said = report_in(reply)
    at = random.randrange(len(said))
    other = random.choice('{}[]",:\\0eE-\ud7ff ') * random.choice([1, 3])
    say(reply, said[:at] if random.random() < 0.4 else said[:at] + other + said[at + 1 :])


def payload(reply: Message, random: Random) -> None:
    """Bytes of an array are lost or flipped: mostly in the header, where a flip decides what the others mean."""
    arrays = reply.content.array_records[PARAMETERS]
    key = random.choice(list(arrays))
    array, data = arrays[key], bytearray(arrays[key].data)
    if random.random() < 0.3:
        data = data[: random.randrange(len(data))]
    else:
        reach = random.choice([128, 128, len(data)])
        for _ in range(random.choice([1, 2, 8])):
            data[random.randrange(reach)] ^= 1 << random.randrange(8)
    arrays[key] = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=bytes(data))


def values(reply: Message, random: Random) -> None:
    """A weight is not finite, and the report announces it so."""
    arrays = [array.numpy().copy() for array in reply.content.array_records[PARAMETERS].values()]
    flat = random.choice(arrays).reshape(-1)
    flat[random.randrange(flat.size)] = random.choice([np.nan, np.inf, -np.inf])
    reply.content[PARAMETERS] = ArrayRecord(arrays)
    say(reply, json.dumps({**json.loads(report_in(reply)), "payload_hash": hash_arrays(arrays)}))


def shapes(reply: Message, random: Random) -> None:
    """An array is missing, is there twice, or has another shape or dtype; or there is none."""
    arrays = [array.numpy() for array in reply.content.array_records[PARAMETERS].values()]
    index = random.randrange(len(arrays))
    array = arrays[index]
    others = [array[None], array[:1].reshape(1, -1), array.reshape(-1)[:-1], array > 0]
    others += [array.astype(dtype) for dtype in (np.float64, np.float16, np.int32, np.complex64)]
    arrays[index : index + 1] = random.choice([[], [array, array], *([np.ascontiguousarray(o)] for o in others)])
    reply.content[PARAMETERS] = ArrayRecord(arrays if random.random() < 0.8 else [])


SPOILS: list[Callable[[Message, Random], None]] = [report, text, payload, values, shapes]
