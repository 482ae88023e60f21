from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.federated.tiny import make_corpus


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def flower_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of Flower's SuperLink in which nothing is: it takes a second to make."""
    from flwr.superlink import config_loader
    from flwr.superlink.federation import NoOpFederationManager

    database = tmp_path_factory.mktemp("flower") / "superlink.db"
    config_loader.get_objectstore_linkstate_factories(str(database), NoOpFederationManager())[1].state()
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return database


@pytest.fixture(autouse=True, scope="module")  # as fixtures of a module need it too: bits may depend on threads
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
