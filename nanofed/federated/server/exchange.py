"""One round's messages: send the weights to every client, and take the answers one at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from nanofed.federated.server.validation import Refused, Update, check_reply
from nanofed.federated.wire.codec import CODECS, Weights
from nanofed.federated.wire.messages import Instructions

POLL_SECONDS = 0.1


def exchange(
    grid: Grid,
    nodes: Mapping[str, int],
    instructions: Mapping[str, Instructions],
    weights: Weights,
    *,
    streams: int,
    seconds: float,
) -> Iterator[tuple[str, Update | Refused]]:
    """Send a round and yield every client with its checked answer, in the order of arrival.

    One answer is held at a time: the caller folds it in before the next is pulled. Duplicates and answers to other rounds
    are passed over; who has not answered in time is refused.

    Args:
        grid: the connection to the nodes.
        nodes: client -> node id.
        instructions: client -> what it is to do; all with the same down-link codec.
        weights: the global weights, sent to all.
        streams: of every client's data.
        seconds: until a client is given up.
    """
    waiting: dict[str, str] = {}  # message id -> client
    codec = CODECS[next(iter(instructions.values())).down_codec]
    arrays = ArrayRecord(codec.encode(weights))  # one for all: in process every message shares it
    for client, node in nodes.items():
        asked = instructions[client]
        content = RecordDict({"fitins.parameters": arrays, "fitins.config": ConfigRecord(asked.to_config())})
        message = Message(content, node, MessageType.TRAIN, ttl=seconds, group_id=str(asked.round))
        waiting.update(dict.fromkeys(grid.push_messages([message]), client))
    deadline = time.monotonic() + seconds
    while waiting and time.monotonic() < deadline:
        replies = list(grid.pull_messages(list(waiting)))
        for reply in replies:
            answered = reply.metadata.reply_to_message_id
            if answered not in waiting:
                continue
            client = waiting.pop(answered)
            try:
                yield client, check_reply(reply, instructions[client], weights, streams)
            except Refused as refusal:
                yield client, refusal
        if not replies and waiting:
            time.sleep(POLL_SECONDS)
    for client in waiting.values():
        yield client, Refused(f"no answer within {seconds:.0f} s")
