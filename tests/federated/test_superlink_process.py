"""The SuperLink's process: weights in memory, the rest in its database, and no reply before all of it is there."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate import sql_linkstate
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore import sql_mixin
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink import config_loader
from flwr.superlink.federation import NoOpFederationManager

from nanofed.errors import NanofedError
from nanofed.federated.deploy.superlink_process import BUSY_SECONDS, hold_back_unfinished, keep_objects_in_memory


@pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Alembic, of Flower's configuration
def test_objects_stay_out_of_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((config_loader, "ObjectStoreFactory"), (sql_mixin, "SQLITE_PRAGMAS")):
        monkeypatch.setattr(module, name, getattr(module, name))
    keep_objects_in_memory(config_loader, sql_mixin)
    database = tmp_path / "state.db"
    objects, state = config_loader.get_objectstore_linkstate_factories(str(database), NoOpFederationManager())
    assert isinstance(objects.store(), InMemoryObjectStore)
    link_state = state.state()
    assert isinstance(link_state, SqlLinkState)
    assert link_state.object_store is objects.store()
    with sqlite3.connect(database) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert "run" in tables
    with link_state.session() as session:
        waits = session.connection().exec_driver_sql("PRAGMA busy_timeout").scalar()
    assert waits == 1000 * BUSY_SECONDS


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
    hold_back_unfinished(sql_linkstate, sql_corestate)
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


def test_another_flower_is_refused() -> None:
    with pytest.raises(NanofedError, match="another way"):
        hold_back_unfinished(ModuleType("another"), sql_corestate)
    with pytest.raises(NanofedError, match="another way"):
        keep_objects_in_memory(ModuleType("another"), sql_mixin)
