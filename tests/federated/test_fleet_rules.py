"""A site's key makes that site's calls: it answers what it was sent, once, and reads, deletes and fills nothing else."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import httpx
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID as SERVER
from flwr.common.serde import message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as Proto
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.state.schema.corestate_models import ObjectPushSession
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink import config_loader
from flwr.superlink import main as superlink
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers
from sqlalchemy import select

from nanofed.errors import NanofedError
from nanofed.federated.deploy import fleet_rules
from nanofed.federated.deploy.admission import Bucket
from nanofed.federated.deploy.fleet_rules import FleetRules, RefusedCall, bind
from nanofed.federated.deploy.keys import init
from tests.faults.perimeter import Site as SignedCalls

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Alembic, of Flower's
CALLS = [name for name in vars(fleet_handlers) if name.endswith(("_node", "_messages", "_object", "_run", "_fab"))]


class Site:
    """A node of a SuperLink whose process is this one, and its calls: those of an honest SuperNode, and any other."""

    def __init__(self, state: SqlLinkState, run: int, key: bytes) -> None:
        self.state, self.run = state, run
        self.id = state.create_node("owner", "name", key, 30.0)
        self.node = Node(node_id=self.id)
        fleet_handlers.activate_node(request=ActivateNodeRequest(public_key=key, heartbeat_interval=30), state=state)

    def asked(self, words: str) -> Message:
        """Let the server send this node a message."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self.run, SERVER  # Message() reads them
        said = RecordDict({"words": ConfigRecord({"words": words})})
        message = Message(said, self.id, "train", ttl=60.0, group_id="1")
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run)
        stored, _ = self.state.store_message_and_object_tree(message, get_object_tree(message), session)
        assert stored
        for name, content in get_all_nested_objects(message).items():
            self.state.store_object(self.run, session, name, content.deflate())
        return message

    def pull(self) -> list[str]:
        response = fleet_handlers.pull_messages(
            request=PullMessagesRequest(node=self.node), state=self.state, store=self.state.object_store
        )
        return [message.metadata.message_id for message in response.messages_list]

    def fetch(self, object_id: str) -> bytes:
        request = PullObjectRequest(node=self.node, run_id=self.run, object_id=object_id)
        return bytes(fleet_handlers.pull_object(request=request, state=self.state).object_content)

    def confirm(self, message: str) -> None:
        request = ConfirmMessageReceivedRequest(node=self.node, run_id=self.run, message_object_id=message)
        fleet_handlers.confirm_message_received(request=request, state=self.state, store=self.state.object_store)

    def reply(self, asked: Message, content: RecordDict | Error | None = None) -> Message:
        TaskIdentity.node_id = self.id
        reply = Message(content or RecordDict({"answer": ArrayRecord([np.arange(3)])}), reply_to=asked)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return reply

    def announce(self, message: Message, change: Callable[[Any], None] = lambda request: None) -> tuple[str, list[str]]:
        """Push a message, of which `change` may change anything; return the session and what objects are to follow."""
        plain = remove_content_from_message(message) if message.has_content() else message
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(plain)],
            message_object_trees=[get_object_tree(message)],
            clientapp_runtime_list=[1.5],
        )
        change(request)
        response = fleet_handlers.push_messages(request=request, state=self.state)
        return response.session_id, list(response.objects_to_push)

    def push(self, session: str, name: str, content: bytes) -> bool:
        request = PushObjectRequest(
            node=self.node, run_id=self.run, session_id=session, object_id=name, object_content=content
        )
        return bool(fleet_handlers.push_object(request=request, state=self.state).stored)

    def answer(self, message: Message) -> None:
        session, missing = self.announce(message)
        for name, content in get_all_nested_objects(message).items():
            if name in missing:
                assert self.push(session, name, content.deflate())


@dataclass
class SuperLink:
    state: SqlLinkState
    a: Site
    b: Site

    def answers(self, asked: Message) -> list[Message]:
        """What the round loop gets."""
        return self.state.get_message_res({asked.object_id}, self.a.run)


@pytest.fixture
def link(tmp_path: Path, flower_database: Path, monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    for name in CALLS:
        monkeypatch.setattr(fleet_handlers, name, getattr(fleet_handlers, name))

    bind(fleet_handlers, FleetRules(SERVER))
    database = tmp_path / "superlink.db"
    shutil.copyfile(flower_database, database)
    _, factory = config_loader.get_objectstore_linkstate_factories(str(database), NoOpFederationManager())
    state = factory.state()
    assert isinstance(state, SqlLinkState)
    run = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
    monkeypatch.setattr(fleet_handlers, "check_abort", lambda *_: None)  # the run is under way
    return SuperLink(state, Site(state, run, b"a"), Site(state, run, b"b"))


def test_an_honest_site_is_served(link: SuperLink) -> None:
    for words in ("first", "second"):
        asked = link.a.asked(words)
        assert link.a.pull() == [asked.object_id]
        for name, content in get_all_nested_objects(asked).items():
            assert link.a.fetch(name) == content.deflate()
        for _ in range(2):  # the answer to the first may have been lost
            link.a.confirm(asked.object_id)
        reply = link.a.reply(asked)
        link.a.announce(reply)  # likewise
        link.a.answer(reply)
        (answer,) = link.answers(asked)
        assert answer.metadata.message_id == reply.object_id
        request = SendNodeHeartbeatRequest(node=link.a.node, heartbeat_interval=30)
        assert fleet_handlers.send_node_heartbeat(request=request, state=link.state).success


def test_a_message_in_the_servers_name_reaches_nobody(link: SuperLink) -> None:
    asked = link.a.asked("words")
    link.a.pull()
    TaskIdentity.node_id = SERVER
    forged = Message(RecordDict({"words": ConfigRecord({"words": "evil"})}), link.b.id, "train", ttl=60.0)
    forged.metadata.__dict__["_message_id"] = forged.object_id
    with pytest.raises(RefusedCall, match="another node's name"):
        link.a.announce(forged)

    def as_an_answer(request: Any) -> None:
        request.messages_list[0].metadata.src_node_id = link.a.id
        request.messages_list[0].metadata.reply_to_message_id = asked.object_id

    with pytest.raises(RefusedCall, match="another than the server"):
        link.a.announce(forged, as_an_answer)
    assert link.b.pull() == []


def test_another_site_is_not_answered_for(link: SuperLink) -> None:
    asked = link.b.asked("words")
    link.b.pull()
    with pytest.raises(RefusedCall, match="another node's name"):
        link.a.announce(link.a.reply(asked))
    with pytest.raises(RefusedCall, match="was not sent"):
        reply = link.a.reply(asked)
        link.a.announce(reply, lambda request: setattr(request.messages_list[0].metadata, "src_node_id", link.a.id))
    assert link.answers(asked) == []
    link.b.answer(link.b.reply(asked))
    assert len(link.answers(asked)) == 1


def test_what_another_site_was_sent_is_neither_read_nor_deleted(link: SuperLink) -> None:
    asked = link.b.asked("words")
    link.b.pull()
    for name in get_all_nested_objects(asked):
        with pytest.raises(RefusedCall, match="in no message to it"):
            link.a.fetch(name)
    with pytest.raises(RefusedCall, match="was not sent"):
        link.a.confirm(asked.object_id)
    with pytest.raises(RefusedCall, match="was sent nothing"):
        fleet_handlers.get_run(request=GetRunRequest(node=link.a.node, run_id=link.a.run), state=link.state)
    assert all(link.b.fetch(name) for name in get_all_nested_objects(asked))


def test_another_site_s_answer_is_not_completed(link: SuperLink) -> None:
    asked = link.b.asked("words")
    link.b.pull()
    reply = link.b.reply(asked)
    session, missing = link.b.announce(reply)
    content = get_all_nested_objects(reply)[missing[0]].deflate()
    for of in (session, ""):  # Flower finds the session of whoever announced it, where none is named
        with pytest.raises(RefusedCall, match="has not announced"):
            link.a.push(of, missing[0], content)
    assert link.b.push(session, missing[0], content)


def test_a_message_is_answered_once(link: SuperLink) -> None:
    asked = link.a.asked("words")
    link.a.pull()
    link.a.answer(link.a.reply(asked))
    other = link.a.reply(asked, RecordDict({"answer": ArrayRecord([np.arange(9)])}))
    with pytest.raises(RefusedCall, match="twice"):
        link.a.announce(other)


CHANGES: dict[str, Callable[[Any], None]] = {
    "no message": lambda request: request.ClearField("messages_list"),
    "two messages": lambda request: request.messages_list.append(request.messages_list[0]),
    "no objects": lambda request: request.ClearField("message_object_trees"),
    "other objects": lambda request: setattr(request.message_object_trees[0], "object_id", "0" * 64),
    "many objects": lambda request: request.message_object_trees[0].children.extend(
        ObjectTree(object_id=f"{n:064x}") for n in range(fleet_rules.OBJECTS)
    ),
    "nested objects": lambda request: request.message_object_trees[0].children.append(deep(90)),
    "no id": lambda request: request.message_object_trees[0].children.append(ObjectTree(object_id="../../x")),
    "another run": lambda request: setattr(request.messages_list[0].metadata, "run_id", 7),
    "another group": lambda request: setattr(request.messages_list[0].metadata, "group_id", "g" * 1_000_000),
    "another type": lambda request: setattr(request.messages_list[0].metadata, "message_type", "t" * 1_000_000),
    "large content": lambda request: request.messages_list[0].content.items.add(key="k" * 1_000_000),
    "time without end": lambda request: setattr(request.messages_list[0].metadata, "ttl", float("inf")),
    "time that is none": lambda request: setattr(request.messages_list[0].metadata, "created_at", float("nan")),
    "duration that is none": lambda request: request.clientapp_runtime_list.__setitem__(0, float("nan")),
    "negative duration": lambda request: request.clientapp_runtime_list.__setitem__(0, -1.0),
    "many durations": lambda request: request.clientapp_runtime_list.extend([1.0] * 1000),
}


def deep(levels: int) -> ObjectTree:
    tree = ObjectTree(object_id="0" * 64)
    for n in range(1, levels):
        tree = ObjectTree(object_id=f"{n:064x}", children=[tree])
    return tree


def test_what_is_no_answer_of_ours_is_refused_before_anything_is_stored(link: SuperLink) -> None:
    asked = link.a.asked("words")
    link.a.pull()
    reply = link.a.reply(asked)
    before = len(link.state.object_store)
    for what, change in CHANGES.items():
        with pytest.raises(RefusedCall):
            link.a.announce(reply, change)
            pytest.fail(what)
    assert len(link.state.object_store) == before
    with link.state.session() as session:
        sessions = session.scalars(select(ObjectPushSession)).all()
    assert not sessions  # that of the server's message is complete


def test_an_error_s_words_are_cut(link: SuperLink) -> None:
    asked = link.a.asked("words")
    link.a.pull()
    link.a.answer(link.a.reply(asked, Error(code=1, reason="x" * 1_000_000)))
    (answer,) = link.answers(asked)
    assert answer.error.reason == "x" * fleet_rules.ERROR


def test_answers_that_the_round_loop_has_not_taken_are_few_and_small(
    link: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_rules, "HELD_BYTES", 10_000)
    asked = [link.a.asked(f"words {n}") for n in range(fleet_rules.HELD + 2)]
    for message in asked:
        link.a.pull()
        link.a.answer(link.a.reply(message, RecordDict({"answer": ArrayRecord([np.full(10, id(message))])})))
    assert [len(link.answers(message)) for message in asked] == [0, 0] + [1] * fleet_rules.HELD
    large = link.a.asked("large")
    link.a.pull()
    with pytest.raises(RefusedCall, match="more than"):
        link.a.answer(link.a.reply(large, RecordDict({"answer": ArrayRecord([np.zeros(10_000)])})))


def test_a_node_that_is_gone_does_not_seem_to_be_there(link: SuperLink) -> None:
    with pytest.raises(RefusedCall, match="heartbeat every 1800 s"):
        request = SendNodeHeartbeatRequest(node=link.a.node, heartbeat_interval=1800)
        fleet_handlers.send_node_heartbeat(request=request, state=link.state)
    with pytest.raises(RefusedCall, match="heartbeat every nan s"):
        activate = ActivateNodeRequest(public_key=b"a", heartbeat_interval=float("nan"))
        fleet_handlers.activate_node(request=activate, state=link.state)


def test_calls_without_end_are_asked_to_wait(link: SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_rules, "CALLS", 1e-9)
    monkeypatch.setattr(fleet_rules, "CALL_BURST", 3)
    for _ in range(3):
        link.a.pull()
    with pytest.raises(RefusedCall, match="calls a second") as refused:
        link.a.pull()
    assert refused.value.status_code == 503, "the SuperNode makes this call again"
    assert link.b.pull() == []


def test_a_bundle_is_asked_for_by_its_hash_of_which_nothing_else_is_logged(
    link: SuperLink, caplog: pytest.LogCaptureFixture
) -> None:
    link.a.asked("words")
    link.a.pull()
    for name in ("\x1b[2J\nnanofed ERROR: exit 2: all is lost", "x" * 1_000_000):
        with pytest.raises(RefusedCall, match="no hash"):
            request = GetFabRequest(node=link.a.node, run_id=link.a.run, hash_str=name)
            fleet_handlers.get_fab(request=request, state=link.state)
        assert name not in caplog.text


def test_refusals_are_logged_once_a_minute(link: SuperLink, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        with pytest.raises(RefusedCall):
            link.a.confirm("x" * 1_000_000)
    (record,) = [record for record in caplog.records if record.name == fleet_rules.__name__]
    assert len(record.getMessage()) < 300 and str(link.a.id) in record.getMessage()


def test_a_refusal_is_one_that_a_supernode_understands(
    tmp_path: Path, flower_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """403: its client takes the run for over and goes on; any other status would end it or be tried again for ever."""
    for name in CALLS:
        monkeypatch.setattr(fleet_handlers, name, getattr(fleet_handlers, name))
    bind(fleet_handlers, FleetRules(SERVER))
    shutil.copyfile(flower_database, tmp_path / "superlink.db")
    monkeypatch.setattr(superlink, "get_ee_linkstate_db", lambda: str(tmp_path / "superlink.db"))
    app = superlink.create_app()
    site = SignedCalls(init(tmp_path / "keys", [], ["lab-a"]), "lab-a")
    node = Node(node_id=app.state.linkstate_factory.state().create_node("owner", "name", site.public, 30.0))

    def call(name: str, request: Any) -> tuple[int, str]:
        headers = {"content-type": "application/protobuf", **site.headers()}

        async def post() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://superlink") as client:
                return await client.post(f"/v1/fleet/{name}", content=request.SerializeToString(), headers=headers)

        answer = asyncio.run(post())
        return answer.status_code, answer.text

    assert call("pull-messages", PullMessagesRequest(node=node))[0] == 200
    status, text = call("confirm-message-received", ConfirmMessageReceivedRequest(node=node, message_object_id="x"))
    assert status == 403 and "was not sent" in text
    monkeypatch.setattr(Bucket, "take", lambda self, patience=0.0: None)
    status, text = call("pull-messages", PullMessagesRequest(node=node))
    assert status == 503 and "calls a second" in text


def test_what_is_remembered_of_nodes_does_not_grow() -> None:
    rules, state = FleetRules(SERVER), MagicMock()
    for number in range(2, 2 * fleet_rules.NODES):
        node = rules.of(number)
    for n in range(10_000):
        asked = Metadata(message_id=f"{n:064x}", run_id=1, group_id="1", message_type="train")
        sent = PullMessagesResponse(messages_list=[Proto(metadata=asked)], message_object_trees=[ObjectTree()])
        rules.sent(node, None, state, sent)
        said = Metadata(message_id=f"{n + 1:064x}", reply_to_message_id=asked.message_id, dst_node_id=SERVER)
        said.MergeFrom(Metadata(run_id=1, group_id="1", message_type="train", src_node_id=number))
        request = PushMessagesRequest(node=Node(node_id=number), messages_list=[Proto(metadata=said)])
        request.message_object_trees.add(object_id=said.message_id)
        rules.answer(node, request, state)
        rules.announced(node, request, state, PushMessagesResponse(session_id=f"session {n}"))
    assert len(rules._nodes) <= fleet_rules.NODES
    assert len(node.asked) <= fleet_rules.SENT and len(node.uploads) <= fleet_rules.HELD
    with pytest.raises(RefusedCall, match="was not sent"):
        rules.answer(rules.of(3), request, state)


def test_another_flower_is_refused() -> None:
    with pytest.raises(NanofedError, match="another way"):
        bind(ModuleType("another"), FleetRules(SERVER))
