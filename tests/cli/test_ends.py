"""Every command's end is one line: whatever is raised, and by whom."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nanofed import cli
from nanofed.errors import ConfigError, DataError, NanofedError
from nanofed.federated.site.trainer import FabricTrainer
from nanofed.training.run_folder import hold_run
from tests.cli.conftest import Corpus


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A command `probe`, whose `main` a test gives it."""
    module = types.ModuleType("probe_command")
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_command", "for tests"))
    monkeypatch.delenv("NANOFED_DEBUG", raising=False)
    return module


def ended(command: types.ModuleType, capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[int, str]:
    def main(argv: list[str]) -> int:
        raise error

    command.main = main  # type: ignore[attr-defined]
    return cli.main(["probe"]), capsys.readouterr().err


DEBUG = " (NANOFED_DEBUG=1 shows the traceback)\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (NanofedError("it failed"), 1, "it failed\n"),
        (ConfigError("it failed"), 2, "it failed\n"),
        (DataError("no shards\nhere"), 3, "no shards here\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), 1, "a/b: No space left on device" + DEBUG),
        (OSError(errno.ENAMETOOLONG, "File name too long"), 1, "File name too long" + DEBUG),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe" + DEBUG),
        (RuntimeError("one\ntwo"), 1, "one" + DEBUG),
        (RuntimeError(), 1, "RuntimeError" + DEBUG),
        (subprocess.TimeoutExpired("flwr", 9), 1, "Command 'flwr' timed out after 9 seconds" + DEBUG),
        (MemoryError(), 1, "out of memory (MemoryError): take a smaller data.device_batch_size or model.depth" + DEBUG),
        (
            RuntimeError("CUDA out of memory. Tried 1 GiB"),
            1,
            "out of memory (CUDA out of memory. Tried 1 GiB): take a ",
        ),
        (
            ModuleNotFoundError("No module named 'x'"),
            1,
            "No module named 'x': the installation is not complete" + DEBUG,
        ),
        (KeyError("step"), 1, "this is a bug of nanofed: KeyError in test_ends.py, line "),
        (
            NotImplementedError("aten::_scaled_mm has no kernel on this device"),
            1,
            "aten::_scaled_mm has no kernel on this device",
        ),
        (RecursionError("too deep"), 1, "this is a bug of nanofed: RecursionError in test_ends.py, line "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_whatever_is_raised_ends_in_one_line(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str], error: Exception, code: int, line: str
) -> None:
    found, said = ended(command, capsys, error)
    assert found == code
    assert said.startswith(f"nanofed probe: {line}") and said.count("\n") == 1 and "Traceback" not in said


@pytest.mark.parametrize("error", [KeyError("step"), DataError("no shards")], ids=["bug", "for people"])
def test_the_traceback_is_shown_on_request(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("NANOFED_DEBUG", "1")
    said = ended(command, capsys, error)[1]
    assert said.startswith("Traceback (most recent call last)") and "NANOFED_DEBUG=1 shows" not in said


def test_a_module_that_cannot_be_imported_ends_in_one_line(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "probe_command", None)
    assert cli.main(["probe"]) == 1
    said = capsys.readouterr().err
    assert "probe_command" in said and said.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_federation_that_is_told_to_end_puts_its_run_away(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    monkeypatch.setattr(FabricTrainer, "fit", lambda *_, **__: signal.raise_signal(number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        cli.main(["federate", "--config", str(corpus.federate), f"--runs_dir={tmp_path}", "--name=stopped"])
    assert (end.value.code, signal.getsignal(number)) == (code, before)
    with hold_run(tmp_path / "stopped"):  # its lock is free
        assert (tmp_path / "stopped" / "config.yaml").is_file()
