from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from nanofed.federated.runtimes.in_process import InProcessGrid


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
