"""The SuperLink's nodes follow the folder of keys, whatever was lost of database and file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.server.superlink.linkstate import sql_linkstate
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.superlink import config_loader
from flwr.superlink.federation import NoOpFederationManager

from nanofed.federated.deploy.keys import Keys, init, read_sites
from nanofed.federated.deploy.registration import Registration, read_nodes
from nanofed.federated.deploy.superlink import FOLDER, NODES
from nanofed.federated.deploy.superlink_process import set_aside_damaged

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Alembic, of Flower's


def state_of(database: Path) -> SqlLinkState:
    _, factory = config_loader.get_objectstore_linkstate_factories(str(database), NoOpFederationManager())
    state = factory.state()
    assert isinstance(state, SqlLinkState)
    return state


class Server:
    """What a server's folder holds, and a registration in a SuperLink that was just started on it."""

    def __init__(self, folder: Path, flower_database: Path) -> None:
        self.database, self.file = folder / FOLDER / "superlink.db", folder / FOLDER / NODES
        self.file.parent.mkdir()
        shutil.copyfile(flower_database, self.database)
        self.keys = init(folder / "keys", [], ["lab-a", "lab-b"])
        self.start()

    def start(self) -> None:
        self.state = state_of(self.database)
        owner = (NOOP_FLWR_AID, NOOP_ACCOUNT_NAME)
        self.registration = Registration(self.state, sql_linkstate, owner, self.keys.sites, self.file)
        self.registration.update()

    def nodes(self) -> dict[str, int]:
        """What Flower knows: the node of each key in the folder."""
        keys = read_sites(self.keys.sites)[0]
        found = {name: self.state.get_node_id_by_public_key(key) for key, name in keys.items()}
        assert None not in found.values()
        assert read_nodes(self.file) == found
        return {name: node for name, node in found.items() if node is not None}


@pytest.fixture
def server(tmp_path: Path, flower_database: Path) -> Server:
    return Server(tmp_path, flower_database)


def public_key(keys: Keys, site: str) -> bytes:
    return next(key for key, name in read_sites(keys.sites)[0].items() if name == site)


def test_a_restart_changes_no_node(server: Server) -> None:
    before = server.nodes()
    assert before.keys() == {"lab-a", "lab-b"}
    server.start()
    assert server.nodes() == before


def test_a_site_whose_key_is_taken_away_is_unregistered_and_may_come_back(server: Server) -> None:
    before, key = server.nodes(), public_key(server.keys, "lab-a")
    assert server.state.activate_node(before["lab-a"], 30.0)
    away = server.keys.public_key("lab-a").rename(server.file.with_name("away"))
    server.keys.public_key("lab-c").write_text("rubbish")  # it keeps nobody in
    server.registration.update()
    assert server.nodes() == {"lab-b": before["lab-b"]}
    assert server.state.get_node_id_by_public_key(key) is None
    assert not server.state.acknowledge_node_heartbeat(before["lab-a"], 30.0)
    away.rename(server.keys.public_key("lab-a"))
    server.registration.update()
    assert server.nodes()["lab-a"] != before["lab-a"]


def test_a_key_taken_away_while_no_server_ran_is_unregistered_at_the_start(server: Server) -> None:
    key = public_key(server.keys, "lab-a")
    server.keys.public_key("lab-a").unlink()
    server.start()
    assert server.nodes().keys() == {"lab-b"}
    assert server.state.get_node_id_by_public_key(key) is None


def test_a_renewed_key_takes_the_place_of_the_old_one(server: Server) -> None:
    before, old = server.nodes(), public_key(server.keys, "lab-a")
    init(server.keys.folder, [], ["lab-a"], force=True)
    server.registration.update()
    after = server.nodes()
    assert after["lab-a"] != before["lab-a"] and after["lab-b"] == before["lab-b"]
    assert server.state.get_node_id_by_public_key(old) is None


def test_a_file_of_nodes_that_is_lost_or_damaged_is_written_again(server: Server) -> None:
    before = server.nodes()
    for content in ("", "{", "[1]", '{"lab-a": "x"}', '{"lab-a": 1, "lab-b": 2}'):
        server.file.write_text(content)
        server.registration.update()
        assert server.nodes() == before
    server.file.unlink()
    server.registration.update()
    assert server.nodes() == before


def test_a_database_that_is_gone_is_begun_anew_and_the_file_follows(server: Server) -> None:
    before = server.nodes()
    server.database.unlink()
    server.database.with_name("superlink.db-wal").write_bytes(b"what the old one left")
    assert not set_aside_damaged(server.database)
    server.start()
    after = server.nodes()
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())


@pytest.mark.parametrize("damage", ["truncated", "torn", "rubbish"])
def test_a_damaged_database_is_put_aside(tmp_path: Path, flower_database: Path, damage: str) -> None:
    content = flower_database.read_bytes()
    assert len(content) > 100_000
    torn = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
    left = {"truncated": content[:5000], "torn": torn, "rubbish": b"no database" * 1000}[damage]
    database = tmp_path / "superlink.db"
    database.write_bytes(left)
    journal = database.with_name("superlink.db-wal")
    journal.write_bytes(b"what the old one left")
    assert set_aside_damaged(database)
    assert not database.exists() and not journal.exists()
    assert database.with_name("superlink.db.damaged").read_bytes() == left


def test_a_sound_database_stays(tmp_path: Path, flower_database: Path) -> None:
    database = tmp_path / "superlink.db"
    shutil.copyfile(flower_database, database)
    assert not set_aside_damaged(database)
    assert database.read_bytes() == flower_database.read_bytes()
