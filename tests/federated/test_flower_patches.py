"""What nanofed changes in Flower, with Flower's own loops and stores: each of these tests fails without its patch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import sql_linkstate
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.corestate import in_memory_corestate, sql_corestate
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink import config_loader
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import http_grid
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from nanofed.errors import NanofedError
from nanofed.federated import flower_patches


def test_waits_grow_to_flowers_and_begin_anew_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(flower_patches, "time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    clock = flower_patches.Waits()
    for _ in range(40):
        clock.sleep(3)
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (flower_patches.FIRST_WAIT, 3)
    assert sum(waits) > 60  # who waits for minutes asks as rarely as Flower
    clock.sleep(0.5)
    clock.sleep(3)
    assert waits[-2:] == [flower_patches.WORKER_WAIT, flower_patches.FIRST_WAIT]
    assert clock.monotonic() > 0


def test_flowers_loop_is_the_one_that_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_client_internal, "time", time)
    flower_patches.look_sooner(start_client_internal)
    assert isinstance(vars(start_client_internal)["time"], flower_patches.Waits)


def test_an_answer_whose_rest_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own loop over its own store: of two pieces, one never comes, and what is sent next goes through."""
    flower_patches.send_every_answer(vars_of(monkeypatch))
    monkeypatch.setattr(start_client_internal, "time", flower_patches.Waits())
    monkeypatch.setattr(flower_patches, "REST_SECONDS", 0.5)
    store, sent, over = InMemoryObjectStore(verify=False), [], []

    def push(name: str, pieces: list[str]) -> None:
        tree = ObjectTree(object_id=name * 64, children=[ObjectTree(object_id=piece * 64) for piece in "bc"])
        store.preregister(1, tree)
        for piece in pieces:
            store.put(piece * 64, piece.encode())
        metadata = SimpleNamespace(
            message_id=name * 64, reply_to_message_id="", group_id="1", run_id=1, message_type=""
        )
        state = SimpleNamespace(
            get_messages_legacy=lambda is_reply: [SimpleNamespace(metadata=metadata)],
            get_message_processing_duration=lambda message_id: 1.0,
            delete_messages=lambda message_ids: over.append(message_ids[0][0]),
        )
        start_client_internal._push_messages(
            state=state,  # type: ignore[arg-type]
            object_store=store,
            send=lambda message, tree, seconds: ({name * 64, "b" * 64, "c" * 64}, "session"),
            push_object=lambda run, session, piece, content: sent.append(piece[0]),
        )

    begin = time.monotonic()
    push("a", ["b"])
    assert 0.5 < time.monotonic() - begin < 5 and over == ["a"] and "c" not in sent
    assert len(store) == 0
    sent.clear()
    push("d", ["b", "c", "d"])
    assert sorted(sent) == ["b", "c", "d"] and over == ["a", "d"]


def test_a_task_without_heartbeats_is_answered_for_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own store of a SuperNode: a worker took a message and died."""
    for name in ("HEARTBEAT_DEFAULT_INTERVAL", "HEARTBEAT_PATIENCE"):
        monkeypatch.setattr(in_memory_corestate, name, getattr(in_memory_corestate, name))
    flower_patches.notice_dead_workers_sooner(in_memory_corestate)
    state = InMemoryNodeState(InMemoryObjectStore(verify=False))
    task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=1, fab_hash="a" * 64)
    assert task is not None
    token = state.claim_task(task)
    assert token is not None and state.activate_task(task) and state.acknowledge_task_heartbeat(task)
    begin = datetime.now(UTC)
    monkeypatch.setattr(in_memory_corestate, "now", lambda: begin + timedelta(seconds=9))
    assert state.get_task_by_token(token) is not None
    monkeypatch.setattr(in_memory_corestate, "now", lambda: begin + timedelta(seconds=11))
    assert state.get_task_by_token(token) is None


@pytest.mark.parametrize("end", ["dies before it reads", "gives up before it reads", "gives up after it has read"])
def test_a_message_that_no_task_is_left_for_is_answered(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own loop and store: it would wait for the answer for ever."""
    module = vars_of(monkeypatch)
    monkeypatch.setattr(module, "time", flower_patches.Waits())
    monkeypatch.setattr(flower_patches, "TASK_LOOK", 0.1)
    flower_patches.send_every_answer(module)
    store, sent = InMemoryObjectStore(), list[Message]()
    state = InMemoryNodeState(store)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, SUPERLINK_NODE_ID  # Message() reads them
    asked = Message(RecordDict(), 5, "train", ttl=60.0)
    task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=7, fab_hash="a" * 64)
    start_client_internal._insert_message(asked, state, store)
    assert task is not None and state.claim_task(task) and state.activate_task(task)

    def send(message: Message, tree: ObjectTree, seconds: float) -> tuple[set[str], str]:
        sent.append(message)
        return set(), "session"

    loop = threading.Thread(
        target=module._push_messages,
        kwargs={"state": state, "object_store": store, "send": send, "push_object": None},
        daemon=True,
    )
    loop.start()
    loop.join(0.5)
    assert loop.is_alive() and not sent, "a task is under way"
    if end == "gives up after it has read":
        assert state.get_messages_legacy(run_ids=[7], is_reply=False, limit=1) == [asked]
        state.record_message_processing_start(asked.metadata.message_id)
    if end == "dies before it reads":
        later = datetime.now(UTC) + timedelta(minutes=2)
        monkeypatch.setattr(in_memory_corestate, "now", lambda: later)
    else:
        assert state.finish_task(task, SubStatus.FAILED, "the message could not be taken")
    loop.join(30)
    assert not loop.is_alive()
    (answer,) = sent
    assert answer.metadata.reply_to_message_id == asked.object_id and answer.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert not state.msg_store, "Flower's loop goes on to the next message"


def test_an_answer_too_many_does_not_hold_up_those_of_later_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own loop and store of messages: a client answers after Flower has answered for it."""
    store, sent, pulled = InMemoryObjectStore(verify=False), list[str](), list[str]()
    state = InMemoryNodeState(store)

    def answer(name: str) -> None:
        of_the_run = {"group_id": "1", "run_id": 7, "message_type": "train"}
        metadata = SimpleNamespace(message_id=name * 64, reply_to_message_id=name, **of_the_run)
        state.store_message(SimpleNamespace(metadata=metadata))  # type: ignore[arg-type]
        store.preregister(7, ObjectTree(object_id=name * 64))

    def pull(state: Any) -> int | None:
        return 7 if pulled and pulled.pop() else None

    def push(state: Any, object_store: Any) -> None:
        while not (found := state.get_messages_legacy(is_reply=True)):
            raise AssertionError("Flower's would wait here")
        sent.extend(message.metadata.message_id[0] for message in found)

    insert = start_client_internal._insert_message
    module: Any = SimpleNamespace(_pull_and_store_message=pull, _push_messages=push, _insert_message=insert)
    flower_patches.send_every_answer(module)

    def look() -> None:
        """One turn of Flower's main loop."""
        if module._pull_and_store_message(state=state) is not None:
            module._push_messages(state=state, object_store=store)

    look()
    assert sent == []
    answer("a")
    pulled.append("b")
    look()  # the message of the next round finds the answer that is too many
    assert sent == ["a"]
    look()
    answer("b")
    look()  # its own is sent when it is there, without another message
    assert sent == ["a", "b"]


def vars_of(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return Flower's module, which is as it was when the test ends."""
    for name in ("_pull_and_store_message", "_push_messages"):
        monkeypatch.setattr(start_client_internal, name, getattr(start_client_internal, name))
    return start_client_internal


@pytest.mark.parametrize("module", [start_client_internal, http_grid])
def test_an_object_that_is_late_is_asked_for_again_soon(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError

    monkeypatch.setattr(module, "pull_objects", module.pull_objects)
    flower_patches.ask_again_soon(module)
    start = time.monotonic()

    def pull(name: str) -> bytes:
        if time.monotonic() - start < 0.3:
            raise ObjectUnavailableError(name)
        return name.encode()

    assert module.pull_objects(["a", "b"], pull_object_fn=pull) == {"a": b"a", "b": b"b"}
    assert time.monotonic() - start < 0.8  # Flower's first wait is 0.8 s at least


@pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Alembic, of Flower's configuration
def test_a_reply_is_handed_over_when_all_of_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storing: list[threading.Thread] = []

    def look(self: SqlLinkState, message_ids: set[str], run_id: int) -> list[Message]:
        """Give a reply half a second to be announced, between the look for unfinished ones and Flower's own."""
        for thread in storing:
            if not thread.ident:
                thread.start()
                thread.join(0.5)
                assert thread.is_alive()
        return flowers(self, message_ids, run_id)

    flowers = SqlLinkState.get_message_res
    monkeypatch.setattr(SqlLinkState, "get_message_res", look)  # and as it was, at the end
    flower_patches.hold_back_unfinished(sql_linkstate, sql_corestate)
    _, factory = config_loader.get_objectstore_linkstate_factories(str(tmp_path / "db"), NoOpFederationManager())
    state = factory.state()
    node = state.create_node("owner", "name", b"key", 30.0)
    assert state.activate_node(node, 30.0)
    run = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, SUPERLINK_NODE_ID  # Message() reads them
    asked = Message(RecordDict(), node, "train", ttl=60.0)
    asked.metadata.__dict__["_message_id"] = asked.object_id
    assert state.store_message_ins(asked)
    TaskIdentity.node_id = node
    reply = Message(RecordDict({"weights": ArrayRecord([np.arange(3), np.ones(2)])}), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    session = state.start_session(run)
    objects, answers = get_all_nested_objects(reply), []
    storing.append(
        threading.Thread(
            target=lambda: answers.append(state.store_message_and_object_tree(reply, get_object_tree(reply), session))
        )
    )
    assert state.get_message_res({asked.object_id}, run) == []
    storing[0].join(60)
    ((stored, missing),) = answers
    assert stored and sorted(missing) == sorted(objects)
    for number, (name, content) in enumerate(objects.items()):
        assert state.get_message_res({asked.object_id}, run) == [], f"{number} of {len(objects)} objects are there"
        assert state.store_object(run, session, name, content.deflate())
    (handed,) = state.get_message_res({asked.object_id}, run)
    assert handed.metadata.message_id == reply.object_id
    assert state.get_message_res({asked.object_id}, run) == []


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("_pull_and_store_message", lambda other: None),
        ("_push_messages", lambda state, other: None),
        ("_insert_message", lambda msg, state: None),
    ],
)
def test_a_flower_whose_functions_take_something_else_is_refused(
    name: str, lacking: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = vars_of(monkeypatch)
    monkeypatch.setattr(module, name, lacking)
    with pytest.raises(NanofedError, match="sends answers in another way"):
        flower_patches.send_every_answer(module)


@pytest.mark.parametrize(
    "patch",
    [
        flower_patches.look_sooner,
        flower_patches.send_every_answer,
        flower_patches.notice_dead_workers_sooner,
        flower_patches.ask_again_soon,
        lambda module: flower_patches.hold_back_unfinished(module, sql_corestate),
    ],
)
def test_another_flower_is_refused(patch: Callable[[ModuleType], None]) -> None:
    with pytest.raises(NanofedError, match="in another way"):
        patch(ModuleType("another"))
