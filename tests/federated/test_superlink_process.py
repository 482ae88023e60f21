"""The SuperLink's process: weights in memory, the rest in its database."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from types import ModuleType

import pytest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore import sql_mixin
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink import config_loader
from flwr.superlink.federation import NoOpFederationManager

from nanofed.errors import NanofedError
from nanofed.federated.runtimes.superlink_process import BUSY_SECONDS, keep_weights_in_memory


@pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Alembic, of Flower's configuration
def test_objects_stay_out_of_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((config_loader, "ObjectStoreFactory"), (sql_mixin, "SQLITE_PRAGMAS")):
        monkeypatch.setattr(module, name, getattr(module, name))
    keep_weights_in_memory(config_loader, sql_mixin)
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


def test_another_flower_is_refused() -> None:
    with pytest.raises(NanofedError, match="another way"):
        keep_weights_in_memory(ModuleType("another"), sql_mixin)
