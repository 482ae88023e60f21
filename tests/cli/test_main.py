"""The table of commands: usage, unknown commands, and the exit code of each kind of end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanofed import cli


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


@pytest.mark.parametrize(
    ("typed", "meant"), [("federat", "federate"), ("tokeniser", "tokenizer"), ("Fit", "fit"), ("zzzzzz", None)]
)
def test_unknown_commands_name_the_nearest(typed: str, meant: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([typed]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert f"no command {typed!r}" in captured.err
    assert ("did you mean" in captured.err) == (meant is not None)
    assert meant is None or f"; did you mean {meant!r}?" in captured.err


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (5, 5)])
def test_a_command_chooses_its_exit_code(returned: int | None, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command_that(monkeypatch, returned) == code


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_that(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "nanofed boom: interrupted\n"


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (">/dev/full", 1, "nanofed --help: the output cannot be written: No space left on device\n"),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
    ],
)
def test_output_that_goes_nowhere(redirected: str, code: int, said: str) -> None:
    line = ["bash", "-c", f'"$0" -m nanofed --help {redirected}', sys.executable]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize(
    "argv",
    [
        ["data", "list", "--data", "LONG"],
        ["data", "pack", "LONG", "--output", "x"],
        ["data", "pack", "x", "--output", "LONG"],
        ["data", "demo", "--output", "LONG"],
        ["tokenizer", "train", "--output", "LONG"],
        ["tokenizer", "train", "--data", "LONG"],
        ["tokenizer", "eval", "--tokenizer", "LONG"],
        ["status", "LONG"],
        ["generate", "--checkpoint", "LONG", "--prompt", "x"],
        ["server", "init", "LONG", "--host", "h", "--site", "s"],
        ["site", "--superlink", "127.0.0.1:1", "--name", "s", "--state", "LONG"],
    ],
    ids=" ".join,
)
def test_every_command_refuses_a_path_that_no_file_can_have(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([part.replace("LONG", "n" * 300) for part in argv]) == 2
    said = capsys.readouterr().err
    assert "is too long a path" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["--help"], ["data", "list", "--help"]])
def test_a_reader_that_has_gone_is_no_error(args: list[str]) -> None:
    code = "import time; time.sleep(0.5); from nanofed.cli import main; raise SystemExit(main())"
    line = [sys.executable, "-u", "-c", code, *args]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0
    process.stderr.close()


USAGE_ERRORS = [
    *("info --jsno", "generate", "generate --prompt p", "generate --checkpoint c"),
    *("tokenizer", "tokenizer nope", "tokenizer train --vocabsize 1"),
    *("data", "data dwnload", "data download", "data pack x", "data list --jso", "data demo -x"),
]


@pytest.mark.parametrize("line", USAGE_ERRORS)
def test_a_usage_error_exits_2_and_shows_the_usage(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2
    assert f"usage: nanofed {line.split()[0]}" in capsys.readouterr().err
