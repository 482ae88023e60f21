"""Processes that are kept going: they start again later and later, say why."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanofed import runtime
from nanofed.federated.deploy import process
from nanofed.federated.deploy.process import SupervisedProcess, last_line, marked
from nanofed.federated.deploy.site import Site
from nanofed.federated.outcome import Outcome
from nanofed.federated.site.options import SiteOptions, WorkerOptions


def test_a_process_that_ends_at_once_is_started_later_each_time_and_its_reason_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(process, "LONGEST_PAUSE", 8.0)
    mark = {"NANOFED_TEST_CHILD": str(tmp_path)}
    code = "print('2026-01-01 proxy ERROR: the key of \\x1b[2J is gone'); raise SystemExit(3)"
    log = tmp_path / "logs" / "proxy.log"
    command, environment = runtime.python("-c", code), runtime.environment(**mark)
    child = SupervisedProcess("proxy", command, environment, "NANOFED_TEST_CHILD", log)
    pauses = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in range(5):
        assert child.keep() is None
        assert child._process is not None
        child._process.wait(60)
        assert child.keep() == Outcome(3, r"2026-01-01 proxy ERROR: the key of \x1b[2J is gone")
        assert child.keep() is None and not child.running  # not yet
        pauses.append(child._due - now[0])
        now[0] = child._due
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 5
    assert all("exit code 3" in line and r"ERROR: the key of \x1b[2J is gone" in line for line in lines)


def test_a_signal_while_a_process_starts_does_not_leave_it_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = subprocess.Popen

    def interrupted(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        made = started(*args, **options)
        signal.raise_signal(signal.SIGINT)  # after its start, and before anybody knows it
        return made

    environment = runtime.environment(NANOFED_TEST_CHILD=str(tmp_path))
    command = runtime.python("-c", "import time; time.sleep(600)")
    child = SupervisedProcess("child", command, environment, "NANOFED_TEST_CHILD", tmp_path / "log")
    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        child.start()
    monkeypatch.undo()
    assert child.running
    child.stop(0.0)
    assert marked(f"NANOFED_TEST_CHILD={tmp_path}") == []


def stubborn(tmp_path: Path) -> SupervisedProcess:
    """Start a process that starts one which leaves session and parent and ignores SIGTERM; return once all are there."""
    orphan = "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    orphan += f"pathlib.Path({str(tmp_path / 'there')!r}).touch(); time.sleep(600)"
    between = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {orphan!r}], start_new_session=True)"
    code = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {between!r}]); time.sleep(600)"
    environment = runtime.environment(NANOFED_TEST_CHILD=str(tmp_path))
    process = SupervisedProcess("tree", runtime.python("-c", code), environment, "NANOFED_TEST_CHILD", tmp_path / "log")
    process.start()
    while not (tmp_path / "there").exists():
        time.sleep(0.05)
    return process


def test_processes_that_left_their_parent_are_stopped_too(tmp_path: Path) -> None:
    process = stubborn(tmp_path)
    mark = f"NANOFED_TEST_CHILD={tmp_path}"
    found = marked(mark)
    assert len(found) == len({os.getsid(one.pid) for one in found}) == 2
    assert marked(mark, "pathlib.Path") == marked(mark, "SIG_IGN") != []
    process.stop(0.5)
    assert marked(mark) == [] and not process.running
    assert all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in found)


def test_a_process_that_is_gone_or_another_user_s_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = stubborn(tmp_path)
    try:
        found = marked(f"NANOFED_TEST_CHILD={tmp_path}")
        environ = psutil.Process.environ

        def refused(self: psutil.Process) -> dict[str, str]:
            if self == found[0]:
                raise psutil.AccessDenied(self.pid)
            if self not in found:
                raise psutil.NoSuchProcess(self.pid)
            return environ(self)

        monkeypatch.setattr(psutil.Process, "environ", refused)
        assert marked(f"NANOFED_TEST_CHILD={tmp_path}") == found[1:]
    finally:
        monkeypatch.undo()
        process.stop(0.0)


def test_without_proc_a_process_ends_with_its_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import time; print(1, flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = runtime.environment(NANOFED_TEST_CHILD=str(tmp_path))
    log = tmp_path / "log"
    process = SupervisedProcess("tree", runtime.python("-c", code), environment, "NANOFED_TEST_CHILD", log)
    process.start()
    while not log.read_text():
        time.sleep(0.05)
    mark = f"NANOFED_TEST_CHILD={tmp_path}"
    assert len(marked(mark)) == 2
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "absent"))
    assert marked(mark) == []
    process.stop(0.5)
    assert not process.running
    monkeypatch.undo()
    end = time.monotonic() + 30  # a killed process is there for a moment
    while marked(mark):
        assert time.monotonic() < end
        time.sleep(0.05)


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
        site = Site(options, [])
        told = next(WorkerOptions.from_json(word) for word in site._worker.command if word.startswith("{"))
        supernode = site._supernode.command
        assert supernode[supernode.index("--superexec-auth-secret-file") + 1] == str(told.secret)
        assert told.supernode == f"127.0.0.1:{supernode[supernode.index('--port') + 1]}"
        assert stat.S_IMODE(told.secret.stat().st_mode) == 0o600
        secrets.append(told.secret.read_text())
        site.close()
    assert len(secrets[0]) == 64 and secrets[0] != secrets[1]
