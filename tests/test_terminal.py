"""The line that moves: on a real terminal, with the log above it; nothing of it anywhere else."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from nanofed import runtime, terminal
from tests.cli.conftest import Corpus, corpus  # noqa: F401

DRAWN = re.compile(r"\r\x1b\[2K([^\r\n\x1b]+)(?=\r\x1b)")


class Terminal:
    """A terminal of some columns in which a command of nanofed's runs."""

    def __init__(self, *command: str, columns: int = 80) -> None:
        self._master, slave = pty.openpty()
        self.resize(columns)
        self.text = ""
        take = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"  # Ctrl-C is for whoever has the terminal
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{take}; from nanofed.cli import main; raise SystemExit(main())", *command],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=runtime.environment(TERM="xterm", NO_COLOR=None),
        )  # fmt: skip
        os.close(slave)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read_until(self, pattern: str, seconds: float = 90.0) -> str:
        """Read on until a line of the terminal looks like this, and return what was drawn meanwhile."""
        start, deadline = len(self.text), time.monotonic() + seconds
        while not re.search(pattern, self.text[start:]):
            assert time.monotonic() < deadline, self.text[-2000:]
            if select.select([self._master], [], [], 0.1)[0]:
                self.text += os.read(self._master, 65536).decode()
        return self.text[start:]

    def interrupt(self) -> int:
        """Press Ctrl-C, read to the end, and return the exit code."""
        os.write(self._master, b"\x03")
        while True:
            try:
                self.text += os.read(self._master, 65536).decode()
            except OSError:  # Linux's word for the end
                os.close(self._master)
                return self._process.wait()


def log(text: str) -> list[str]:
    """Return the lines that stay on the terminal."""
    return [line.split(terminal.ERASE)[-1] for line in text.rstrip().split("\r\n")]


@pytest.mark.slow
def test_fit_shows_a_line_that_moves_under_its_log(corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    options = [f"--runs_dir={tmp_path}", "--model.recipe.num_steps=100000", "--eval_every=20"]
    shell = Terminal(*corpus.start("fit", *options))
    drawn = shell.read_until(r"step \d+/100,000  [\d,]+ tok/s  .* to go  loss \d\.\d{3}  bpb \d\.\d{4}\r")
    assert all(len(line) < 80 for line in DRAWN.findall(drawn))
    shell.resize(40)
    time.sleep(2 * terminal.DRAW_SECONDS)
    shell.read_until("\r")  # what was drawn before the terminal was narrower
    assert all(len(line) < 40 for line in DRAWN.findall(shell.read_until(r"\x1b\[2Kstep [^\r]+\r")))
    shell.read_until(r"M tokens +\d+\.\d s  val")
    assert shell.interrupt() == 130
    lines = log(shell.text)
    validations = [line for line in lines if " val " in line]
    assert all(
        re.fullmatch(r"step +[\d,]+/100,000 .* val \d\.\d{4} bits per byte(  [\d,]+ tok/s)?", v) for v in validations
    )
    assert len(validations) > 1
    assert re.fullmatch(r"stopped after step [\d,]+; .*", lines[-2])
    assert lines[-1] == "nanofed fit: interrupted"


@pytest.mark.slow
def test_federate_shows_what_each_client_does(corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    options = [
        f"--runs_dir={tmp_path}",
        "--federation.clients=9",
        "--federation.round_steps=null",
        "--federation.rounds=null",
    ]
    seconds = ["--federation.round_seconds=0.5", "--model.recipe.num_steps=100000"]
    shell = Terminal(*corpus.start("federate", *options, *seconds))
    shell.read_until(r"round 1  \d s left  client-4 [1-9]\d* steps [\d,]+k? tok/s  4 done, 4 waiting")
    shell.read_until("round   1  9 of 9 clients")
    assert all(len(line) < 80 for line in DRAWN.findall(shell.text))
    assert shell.interrupt() == 130
    assert log(shell.text)[-1] == "nanofed federate: interrupted"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "xterm")])
def test_a_terminal_that_wants_plain_lines_gets_no_other(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = pty.openpty()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    with os.fdopen(slave, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with terminal.StatusLine(lambda columns: "x" * 200):
            time.sleep(1.5 * terminal.DRAW_SECONDS)
        stream.write("end")
    drawn = ""
    while not drawn.endswith("end"):
        drawn += os.read(master, 1000).decode()
    os.close(master)
    assert drawn == (f"{terminal.ERASE}{'x' * 79}{terminal.ERASE}end" if value == "xterm" else "end")
