"""The table of commands: usage, unknown commands, and the exit code of each kind of end."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from nanofed import cli
from nanofed.errors import ConfigError, DataError, NanofedError


def run_command_that(monkeypatch: pytest.MonkeyPatch, ends: BaseException | int | None) -> int:
    def main(argv: list[str]) -> int | None:
        assert argv == ["boom", "--key", "1"]
        if isinstance(ends, BaseException):
            raise ends
        return ends

    monkeypatch.setitem(cli.COMMANDS, "boom", ("tests.cli.boom", "ends as told"))
    monkeypatch.setitem(sys.modules, "tests.cli.boom", SimpleNamespace(main=main))
    return cli.main(["boom", "--key", "1"])


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["-h"], 0), (["help"], 0)])
def test_usage_names_every_command(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == code
    shown = capsys.readouterr().out
    for command, (_, summary) in cli.COMMANDS.items():
        assert f"  {command:<10} {summary}\n" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from nanofed import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nanofed {__version__}\n"


@pytest.mark.parametrize(("typed", "meant"), [("federat", "federate"), ("tokeniser", "tokenizer"), ("Fit", "fit")])
def test_unknown_command_suggests_the_nearest(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([typed]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"no command {typed!r}; did you mean {meant!r}?" in captured.err


def test_unknown_command_that_resembles_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["zzzzzz"]) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(NanofedError("it failed"), 1), (ConfigError("it failed"), 2), (DataError("it failed"), 3)]
)
def test_our_errors_are_one_line(
    error: NanofedError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_that(monkeypatch, error) == code
    assert capsys.readouterr() == ("", "nanofed boom: it failed\n")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (5, 5)])
def test_a_command_chooses_its_exit_code(returned: int | None, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command_that(monkeypatch, returned) == code


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_that(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "nanofed boom: interrupted\n"


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "nanofed", "nope"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("nanofed: there is no command 'nope'")


@pytest.mark.parametrize("args", [["--help"], ["data", "list", "--help"]])
def test_a_reader_that_has_gone_is_no_error(args: list[str]) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-u",
            "-c",
            "import time; time.sleep(0.5); from nanofed.cli import main; raise SystemExit(main())",
            *args,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0
    process.stderr.close()
