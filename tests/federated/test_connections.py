from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.flower_config import parse_superlink_connection

from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.runtimes import connections as module
from nanofed.federated.runtimes.connections import Resources, write_connections

TWO = {"local-simulation": Resources(2, 4, 0), "local-simulation-gpu": Resources(2, 4, 1)}
OWN = '# mine\n[superlink]\ndefault = "work"  # keep\n\n[superlink.work]\naddress = "10.0.0.1:8000"\n'


def superlinks(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((home / "config.toml").read_text())["superlink"]
    return found


def test_a_new_file_holds_flowers_own_connections_and_ours(tmp_path: Path) -> None:
    assert write_connections(tmp_path / "new", TWO) == list(TWO)
    assert set(superlinks(tmp_path / "new")) == {"default", "supergrid", "local", *TWO}


def test_flower_reads_what_was_written(tmp_path: Path) -> None:
    write_connections(tmp_path, TWO)
    read = {name: parse_superlink_connection(superlinks(tmp_path)[name], name) for name in TWO}
    for name, gpus in (("local-simulation", 0.0), ("local-simulation-gpu", 1.0)):
        options = read[name].options
        assert read[name].address == ":local:" and options is not None and options.num_supernodes == 2
        assert options.backend is not None and options.backend.client_resources is not None
        assert (options.backend.client_resources.num_cpus, options.backend.client_resources.num_gpus) == (4, gpus)


def test_the_rest_of_the_file_stays_to_the_letter_and_ours_is_refreshed(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(OWN)
    write_connections(tmp_path, TWO)
    once = path.read_text()
    assert once.startswith(OWN.rstrip()) and set(superlinks(tmp_path)) == {"default", "work", *TWO}
    write_connections(tmp_path, TWO)
    assert path.read_text() == once
    path.write_text(once + "\n[superlink.later]\naddress = 'x'\n")
    write_connections(tmp_path, {name: Resources(5, 4, 0) for name in TWO})
    after = superlinks(tmp_path)
    assert set(after) == {"default", "work", "later", *TWO} and after["default"] == "work"
    assert after["local-simulation"]["options"]["num-supernodes"] == 5


def test_a_connection_of_the_owner_is_left_alone(tmp_path: Path) -> None:
    own = OWN + '\n[superlink.local-simulation]\naddress = "10.0.0.2:8000"\n'
    (tmp_path / "config.toml").write_text(own)
    assert write_connections(tmp_path, TWO) == ["local-simulation-gpu"]
    assert superlinks(tmp_path)["local-simulation"] == {"address": "10.0.0.2:8000"}


def test_a_broken_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for broken in ("[superlink\n", OWN + module.START + "\n"):
        path.write_text(broken)
        with pytest.raises(ConfigError, match=str(path)):
            write_connections(tmp_path, TWO)
        assert path.read_text() == broken


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "config.toml").write_text(OWN)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(NanofedError, match="No space left"):
        write_connections(tmp_path, TWO)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
    assert (tmp_path / "config.toml").read_text() == OWN


@pytest.mark.parametrize(
    ("cpus", "gpus", "client"), [(2, 0, (2, 0.0)), (16, 1, (16, 1.0)), (16, 4, (4, 1.0)), (2, 8, (1, 1.0))]
)
def test_a_client_takes_all_there_is_for_its_turn(cpus: int, gpus: int, client: tuple[int, float]) -> None:
    resources = Resources(3, cpus, gpus)
    assert (resources.client_cpus, resources.client_gpus) == client
    assert (resources.clients, resources.cpus) == (3, cpus)
