"""Processes that are kept going: they start again later and later, say why, and find no command of another's."""

from __future__ import annotations

import logging
import shutil
import stat
import time
from pathlib import Path

import pytest

from nanofed import runtime
from nanofed.federated import processes
from nanofed.federated.processes import Child, last_error
from nanofed.federated.site.options import SiteOptions
from nanofed.federated.site.supervisor import _Site, socket_path


def test_a_process_that_ends_at_once_is_started_later_each_time_and_its_reason_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(processes, "LONGEST_PAUSE", 8.0)
    mark = {"NANOFED_TEST_CHILD": str(tmp_path)}
    code = "print('2026-01-01 proxy ERROR: the key of \\x1b[2J is gone'); raise SystemExit(3)"
    child = Child(
        "proxy", runtime.python("-c", code), runtime.environment(**mark), tmp_path / "logs" / "proxy.log",
        f"NANOFED_TEST_CHILD={tmp_path}",
    )  # fmt: skip
    pauses = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in range(4):
        assert child.keep() is None
        assert child._process is not None
        child._process.wait(60)
        assert child.keep() == 3
        assert child.keep() is None and not child.running  # not yet
        pauses.append(child._due - now[0])
        now[0] = child._due
    assert pauses == [2.0, 4.0, 8.0, 8.0]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 4
    assert all("exit code 3" in line and r"ERROR: the key of \x1b[2J is gone" in line for line in lines)


def test_the_reason_of_an_end_is_looked_for_in_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "trainer.log"
    assert last_error(log) == "its log cannot be read: No such file or directory"
    log.write_text("")
    assert last_error(log) == "it said nothing"
    log.write_text("x" * 10_000_000 + "\nnanofed ERROR: exit 2: the data is gone\nbye\n")
    assert last_error(log) == "the data is gone"
    log.write_text("x" * 10_000_000)
    assert len(last_error(log)) <= 300


def test_a_site_starts_no_client_but_its_own(tmp_path: Path) -> None:
    options = SiteOptions("localhost:1", "lab-a", None, None, tmp_path / "a site")
    options.folder.mkdir()
    site = _Site(options, [])
    path = site.supernode._environment["PATH"]
    own = options.folder / "bin" / "flwr-clientapp"
    assert shutil.which("flwr-clientapp", path=path) == str(own)
    assert "nanofed.federated.site.bundle" in own.read_text() and " -P " in own.read_text()
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert shutil.which("flower-superexec", path=path) == str(own.with_name("flower-superexec"))
    before = own.read_text()
    shutil.rmtree(own.parent)
    assert shutil.which("flwr-clientapp", path=path) is None  # Flower's own would run what a message brings
    site._write_launchers()
    own.write_text("torn")
    site._write_launchers()
    assert own.read_text() == before and stat.S_IMODE(own.stat().st_mode) == 0o700


def test_a_socket_is_in_the_user_s_own_folder_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("XDG_RUNTIME_DIR", raising=False)
        usual = socket_path(tmp_path)
    own = Path("/tmp") / f"nf{time.time_ns() % 10**9}"
    own.mkdir(mode=0o700)
    try:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(own))
        assert socket_path(tmp_path).parent.parent == own
        own.chmod(0o755)
        assert socket_path(tmp_path) == usual
        own.chmod(0o700)
        link = own / "link"
        link.symlink_to(own)
        for other in (str(link), "relative", str(own / "missing"), ""):
            monkeypatch.setenv("XDG_RUNTIME_DIR", other)
            assert socket_path(tmp_path) == usual
    finally:
        shutil.rmtree(own)
