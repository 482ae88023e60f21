"""A round's messages over a grid whose answers come when they like."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
from flwr.app import Error, Message
from flwr.serverapp import Grid

from nanofed.errors import NanofedError
from nanofed.federated.server.events import Events
from nanofed.federated.server.messenger import Messenger
from nanofed.federated.server.validation import RefusedReply
from nanofed.federated.wire.messages import LIFE
from tests.federated.replies import STREAMS, instructions, request, sent

CLIENT, NODE = "client-0", 1


class SlowGrid:
    """Has an answer to a message when that is put in `answers`."""

    def __init__(self) -> None:
        self.pushed: list[Message] = []
        self.answers: dict[str, Message] = {}
        self.asked: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        first = len(self.pushed)
        self.pushed += messages
        return [f"message {n}" for n in range(first, len(self.pushed))]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.asked += message_ids
        return [self.answers.pop(name) for name in message_ids if name in self.answers]


def answer(message_id: str, error: str = "") -> Message:
    asked = request()
    asked.metadata.__dict__["_message_id"] = message_id
    return Message(Error(1, error), reply_to=asked) if error else Message(asked.content, reply_to=asked)


def play(messenger: Messenger, number: int, seconds: float = 0.3, meanwhile: Callable[[], None] = lambda: None) -> Any:
    request()  # Message() reads what it sets
    messenger.send({CLIENT: NODE}, {CLIENT: instructions(round=number)}, sent(), seconds=seconds)
    results = messenger.replies(number, meanwhile)
    (one,) = list(results)
    return one.result


def test_a_late_answer_is_named_and_dropped_and_the_message_lives_for_it() -> None:
    grid, events = SlowGrid(), Events()
    messenger = Messenger(cast(Grid, grid), events, streams=STREAMS, most_pending=1)
    silent = play(messenger, 1)
    assert isinstance(silent, RefusedReply) and silent.kind == "silent"
    assert grid.pushed[0].metadata.ttl == LIFE * 0.3
    grid.answers["message 0"] = answer("message 0")
    assert play(messenger, 2).kind == "silent"
    late = events.last("late", CLIENT)
    assert late is not None and late.count == 1
    assert messenger.late == {CLIENT}
    assert late.reason == "its answer to round 1 came when that was over"
    grid.asked.clear()
    assert play(messenger, 3).kind == "silent"
    assert set(grid.asked) == {"message 1", "message 2"}, "who has answered is not asked again"


def test_flowers_word_for_a_dead_message_ends_the_waiting_for_it() -> None:
    grid, events = SlowGrid(), Events()
    messenger = Messenger(cast(Grid, grid), events, streams=STREAMS, most_pending=1)
    play(messenger, 1)
    grid.answers["message 0"] = answer("message 0", error="the message is unavailable")
    play(messenger, 2)
    grid.asked.clear()
    play(messenger, 3)
    assert "message 0" not in grid.asked
    assert events.total() == 0


def test_what_the_server_does_meanwhile_takes_no_clients_time() -> None:
    """A checkpoint that takes longer than the round: the answers that came in that time are still looked for."""
    grid = SlowGrid()
    grid.answers["message 0"] = answer("message 0", "the client's own error")
    result = play(
        Messenger(cast(Grid, grid), Events(), streams=STREAMS, most_pending=1), 1, meanwhile=lambda: time.sleep(0.5)
    )
    assert isinstance(result, RefusedReply) and result.kind == "failed"


def test_nobody_is_waited_for_when_the_server_could_not_go_on() -> None:
    def full() -> None:
        raise NanofedError("the disk is full")

    messenger = Messenger(cast(Grid, SlowGrid()), Events(), streams=STREAMS, most_pending=1)
    with pytest.raises(NanofedError, match="the disk is full"):
        play(messenger, 1, meanwhile=full)
    assert messenger.waiting_for == set()


# --- messages that are waited for one by one


def ask(messenger: Messenger, client: str, number: int, seconds: float) -> None:
    request()
    one = instructions(client=client, round=number)
    messenger.send({client: NODE}, {client: one}, sent(), seconds=seconds)


def test_each_message_has_a_time_of_its_own() -> None:
    grid, events = SlowGrid(), Events()
    messenger = Messenger(cast(Grid, grid), events, streams=STREAMS, most_pending=1)
    ask(messenger, "fast", 1, seconds=30.0)
    ask(messenger, "gone", 1, seconds=0.2)
    assert list(messenger.arrivals(1)) == [] and messenger.waiting_for == {"fast", "gone"}
    time.sleep(0.25)
    (silent,) = messenger.arrivals(1)
    assert silent.client == "gone" and isinstance(silent.result, RefusedReply) and silent.result.kind == "silent"
    grid.answers |= {"message 0": answer("message 0", "it failed"), "message 1": answer("message 1")}
    (failed,) = messenger.arrivals(2)
    assert failed.client == "fast" and isinstance(failed.result, RefusedReply) and failed.result.kind == "failed"
    assert messenger.waiting_for == set()
    ask(messenger, "fast", 3, seconds=30.0)
    assert list(messenger.arrivals(3)) == [] and messenger.late == {"gone"}
    assert events.total("late", client="gone") == 1


def test_answers_that_were_not_looked_at_are_there_at_the_next_look() -> None:
    grid = SlowGrid()
    messenger = Messenger(cast(Grid, grid), Events(), streams=STREAMS, most_pending=1)
    for number, client in enumerate(("a", "b")):
        ask(messenger, client, 1, seconds=30.0)
        grid.answers[f"message {number}"] = answer(f"message {number}", "it failed")
    arrivals = messenger.arrivals(1)
    assert next(arrivals).client == "a"
    arrivals.close()
    assert messenger.waiting_for == {"b"} and [reply.client for reply in messenger.arrivals(2)] == ["b"]


def test_who_is_given_up_is_not_waited_for() -> None:
    grid = SlowGrid()
    messenger = Messenger(cast(Grid, grid), Events(), streams=STREAMS, most_pending=1)
    for client in ("a", "b"):
        ask(messenger, client, 1, seconds=0.0)
    messenger.give_up("a")
    assert messenger.waiting_for == {"b"}
    messenger.give_up()
    assert list(messenger.arrivals(1)) == [], "nobody is silent who is not waited for"
