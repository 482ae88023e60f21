from __future__ import annotations

from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from nanofed.federated.runtimes.in_process import InProcessGrid
from tests.federated.replies import instructions


@pytest.fixture
def handled() -> list[str]:
    return []


@pytest.fixture
def grid(handled: list[str]) -> InProcessGrid:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        name = str(context.node_config["name"])
        handled.append(name)
        if message.content.config_records["config"]["fail"]:
            raise RuntimeError(f"{name} cannot")
        rounds = context.state.config_records.setdefault("rounds", ConfigRecord({"n": 0}))
        rounds["n"] = int(str(rounds["n"])) + 1
        return Message(RecordDict({"answer": ConfigRecord({"name": name, "n": rounds["n"]})}), reply_to=message)

    return InProcessGrid(app, ["a", "b"])


def message(node: int, *, fail: bool = False) -> Message:
    return Message(RecordDict({"config": ConfigRecord({"fail": fail})}), node, MessageType.TRAIN)


def test_clients_work_one_at_a_time_when_their_reply_is_pulled(grid: InProcessGrid, handled: list[str]) -> None:
    assert list(grid.get_node_ids()) == [1, 2]
    ids = list(grid.push_messages([message(1), message(2)]))
    assert handled == [] and len(set(ids)) == 2
    first = list(grid.pull_messages(ids))
    assert handled == ["a"] and [reply.metadata.reply_to_message_id for reply in first] == ids[:1]
    second = list(grid.pull_messages(ids[1:]))
    assert handled == ["a", "b"] and second[0].metadata.src_node_id == 2
    assert list(grid.pull_messages(ids)) == [], "no reply comes twice"
    assert list(grid.pull_messages(["unknown"])) == []


def test_a_clients_failure_is_a_reply(grid: InProcessGrid) -> None:
    bad, good = grid.send_and_receive([message(1, fail=True), message(2)])
    assert bad.has_error() and bad.error.reason == "RuntimeError: a cannot"
    assert not good.has_error() and good.content.config_records["answer"]["name"] == "b"


def test_contexts_last_between_messages(grid: InProcessGrid) -> None:
    for expected in (1, 2):
        (reply,) = grid.send_and_receive([message(1)])
        assert reply.content.config_records["answer"]["n"] == expected
    (other,) = grid.send_and_receive([message(2)])
    assert other.content.config_records["answer"]["n"] == 1, "each client has its own"


def test_an_interrupt_is_no_clients_failure(handled: list[str]) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(InProcessGrid(app, ["a"]).send_and_receive([message(1)]))


def test_clients_of_several_speeds_answer_in_the_order_in_which_they_are_ready() -> None:
    """Of 6 and 2 tokens in a unit of time: 12 tokens take 2 and 6; a budget of seconds is as long as it says."""
    app, handled = ClientApp(), list[str]()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        handled.append(f"{context.node_config['name']} {message.metadata.group_id}")
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, ["fast", "slow"], [6.0, 2.0])

    def send(node: int, name: str, **asked: Any) -> str:
        config = ConfigRecord(instructions(max_steps=3, batch_tokens=4, **asked).to_config())
        content = RecordDict({"fitins.config": config})
        (message_id,) = grid.push_messages([Message(content, node, MessageType.TRAIN, group_id=name)])
        return message_id

    waiting = [send(2, "at 6"), send(1, "at 2")]
    assert not grid.pull_messages([waiting[0]]) and handled == [], "another one is ready before it"
    assert grid.pull_messages([waiting[1]])
    waiting += [send(1, "at 4"), send(1, "at 3", seconds=1.0)]
    assert grid.pull_messages([waiting[3]]) and grid.pull_messages([waiting[2]]) and grid.pull_messages([waiting[0]])
    assert handled == ["fast at 2", "fast at 3", "fast at 4", "slow at 6"]
