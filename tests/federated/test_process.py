"""Processes that are kept going: they start again later and later, say why."""

from __future__ import annotations

import logging
import stat
import time
from pathlib import Path

import pytest

from nanofed import runtime
from nanofed.federated.deploy import process
from nanofed.federated.deploy.process import Child, last_line
from nanofed.federated.deploy.site import _Site
from nanofed.federated.outcome import Outcome
from nanofed.federated.site.options import SiteOptions, WorkerOptions


def test_a_process_that_ends_at_once_is_started_later_each_time_and_its_reason_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(process, "LONGEST_PAUSE", 8.0)
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
        assert child.keep() == Outcome(3, r"2026-01-01 proxy ERROR: the key of \x1b[2J is gone")
        assert child.keep() is None and not child.running  # not yet
        pauses.append(child._due - now[0])
        now[0] = child._due
    assert pauses == [2.0, 4.0, 8.0, 8.0]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 4
    assert all("exit code 3" in line and r"ERROR: the key of \x1b[2J is gone" in line for line in lines)


def test_the_reason_of_an_end_is_looked_for_in_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "trainer.log"
    assert last_line(log) == "its log cannot be read: No such file or directory"
    log.write_text("")
    assert last_line(log) == "it said nothing"
    log.write_text("x" * 10_000_000 + "\nthe data is gone\n\n")
    assert last_line(log) == "the data is gone"
    log.write_text("x" * 10_000_000)
    assert len(last_line(log)) <= 300


def test_a_site_s_worker_and_its_supernode_share_a_secret_of_their_own(tmp_path: Path) -> None:
    options = SiteOptions("localhost:1", "lab-a", None, None, tmp_path / "a site")
    options.folder.mkdir()
    secrets = []
    for _ in range(2):
        site = _Site(options, [])
        told = next(WorkerOptions.from_json(word) for word in site._worker._command if word.startswith("{"))
        supernode = site._supernode._command
        assert supernode[supernode.index("--superexec-auth-secret-file") + 1] == told.secret
        assert told.supernode == f"127.0.0.1:{supernode[supernode.index('--port') + 1]}"
        assert stat.S_IMODE(Path(told.secret).stat().st_mode) == 0o600
        secrets.append(Path(told.secret).read_text())
        site.stop()
    assert len(secrets[0]) == 64 and secrets[0] != secrets[1]
