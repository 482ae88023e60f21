"""What the service around a SuperLink notices while it runs: a lost database, keys that come and go."""

from __future__ import annotations

import collections
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanofed.errors import NanofedError
from nanofed.federated.deploy import server
from nanofed.federated.deploy.keys import Keys, init
from nanofed.federated.deploy.server import _Service
from nanofed.federated.deploy.superlink import SuperLink, write_app
from nanofed.federated.federation import Start
from nanofed.federated.wire.bundle import installed


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return init(tmp_path / "keys", [], ["lab-a", "lab-b"])


@pytest.fixture
def service(tmp_path: Path, keys: Keys) -> _Service:
    """The service of a SuperLink that runs, as far as it looks at files."""
    folder = tmp_path / "run" / "server"
    folder.mkdir(parents=True)
    link = SuperLink(folder, folder / "flower.log")
    service = _Service(link, ("127.0.0.1", 9092), keys, Start(str(folder.parent), ""), lambda: None)
    service._database.write_bytes(b"of Flower")
    service._database_file = server._identity(service._database)
    return service


def test_a_database_that_was_removed_or_replaced_ends_the_superlink(
    service: _Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SuperLink, "alive", True)
    service._look(1)
    kept = service._database.rename(service._database.with_name("kept"))
    lost = "superlink.db, which the SuperLink was using, was removed or replaced"
    with pytest.raises(NanofedError, match=lost):
        service._look(1)
    service._database.write_bytes(b"another")
    with pytest.raises(NanofedError, match=lost):
        service._look(1)
    kept.replace(service._database)
    service._look(1)


def test_sites_that_come_and_go_are_said_once(service: _Service, keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def said() -> list[str]:
        caplog.clear()
        service._say_sites()
        service._say_sites()
        return sorted(record.getMessage() for record in caplog.records)

    assert said() == ["site lab-a may take part", "site lab-b may take part"]
    keys.public_key("lab-a").unlink()
    keys.public_key("lab-x").write_text("rubbish")
    gone, bad = sorted(said(), key=lambda line: "passed over" in line)
    assert gone == "the key of site lab-a is refused from now on"
    assert bad.startswith(f"passed over: {keys.public_key('lab-x')} cannot be read")
    init(keys.folder, [], ["lab-b"], force=True)
    assert said() == ["site lab-b may take part", "the old key of site lab-b is refused from now on"]


def test_the_bundle_is_written_anew_for_each_run(service: _Service) -> None:
    for _ in range(2):
        app = write_app(service._folder / "app")
        found = {p.relative_to(app).as_posix(): p.read_bytes() for p in app.rglob("*.py")}
        assert found == installed()
        settings = (app / "pyproject.toml").read_text()
        assert 'serverapp = "nanofed.federated.runtimes.flower_app:server"' in settings
        (app / "nanofed" / "errors.py").write_text("torn")
        (app / "stray.py").write_text("print('run beside the keys')")


def test_a_run_is_given_up_after_crashes_and_not_while_the_disk_is_full(
    service: _Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[int] = []

    def watch(run_id: int) -> None:
        watched.append(run_id)
        raise NanofedError("the SuperLink died")

    monkeypatch.setattr(service, "_start_link", lambda: None)
    monkeypatch.setattr(service._link, "submit", lambda app: 1)
    monkeypatch.setattr(service, "_watch", watch)
    pauses: list[float] = []
    monkeypatch.setattr(server, "time", SimpleNamespace(sleep=pauses.append))  # not the sleep of other threads
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0 if len(watched) <= 20 else 1 << 40))
    service._link.home.mkdir(parents=True, exist_ok=True)
    with pytest.raises(NanofedError, match=f"the run ended {server.CRASHES} times without a round between"):
        service.serve()
    assert len(watched) == 20 + server.CRASHES
    assert max(pauses) <= 60 and pauses[:4] == sorted(pauses[:4]) and pauses[19] == 60
