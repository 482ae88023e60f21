from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nanofed import api, cli

PROMPT = "the quick naïve"


def said(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["generate", *options]) == 0
    return capsys.readouterr().out


def test_prompt_then_text_then_newline(fit_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", str(fit_run), "--prompt", PROMPT, "--max_tokens", "20", "--temperature", "0"]
    expected = "".join(api.generate(fit_run, PROMPT, max_tokens=20, temperature=0))
    assert expected
    assert said(capsys, *options) == f"{PROMPT}{expected}\n"


def test_a_prompt_that_is_no_text_is_refused(fit_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--checkpoint", str(fit_run), "--prompt", "a\udcff"]) == 2  # bytes that are no UTF-8
    assert capsys.readouterr() == (
        "",
        "nanofed generate: the prompt is no text: it cannot be written as UTF-8 (surrogates not allowed)\n",
    )


def test_options_reach_the_sampling(fit_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--checkpoint", str(fit_run), "--prompt", PROMPT, "--max_tokens", "24", "--device", "cpu"]
    drawn = said(capsys, *base, "--seed", "1", "--temperature", "1.5", "--top_k", "0")
    sampled = "".join(api.generate(fit_run, PROMPT, max_tokens=24, seed=1, temperature=1.5, top_k=None))
    assert drawn == f"{PROMPT}{sampled}\n"
    assert said(capsys, *base, "--seed", "1", "--temperature", "1.5", "--top_k", "0") == drawn
    assert said(capsys, *base, "--seed", "2", "--temperature", "1.5", "--top_k", "0") != drawn
    greedy = said(capsys, *base, "--temperature", "0")
    assert said(capsys, *base, "--seed", "7", "--temperature", "1.5", "--top_k", "1") == greedy
    assert said(capsys, *base, "--max_tokens", "0") == f"{PROMPT}\n"


def test_one_checkpoint_and_the_newest_of_a_run_are_the_same(fit_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = max((fit_run / "checkpoints").iterdir())
    asked = ["--prompt", "fox", "--max_tokens", "8"]
    assert said(capsys, "--checkpoint", str(fit_run), *asked) == said(capsys, "--checkpoint", str(newest), *asked)


def test_a_federated_run_speaks_too(federated_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--checkpoint", str(federated_run), "--prompt", PROMPT, "--max_tokens", "12")
    assert out.startswith(PROMPT)
    assert len(out) > len(PROMPT) + 1


def test_pieces_come_as_they_are_sampled(fit_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            events.append(f"write {text!r}")
            return len(text)

        def flush(self) -> None:
            events.append("flush")

    def pieces(*args: Any, **options: Any) -> Iterator[str]:
        for text in ("a", "b"):
            events.append(f"sample {text}")
            yield text

    monkeypatch.setattr(api, "generate", pieces)
    monkeypatch.setattr(sys, "stdout", Out())
    assert cli.main(["generate", "--checkpoint", str(fit_run), "--prompt", "p"]) == 0
    expected = ["write 'p'", "flush", "sample a", "write 'a'", "flush", "sample b", "write 'b'", "flush", r"write '\n'"]
    assert events == [*expected, "flush"]


@pytest.mark.slow
def test_a_process_reads_the_prompt_from_standard_input(fit_run: Path) -> None:
    command = [sys.executable, "-m", "nanofed", "generate", "--checkpoint", str(fit_run), "--prompt", "-"]
    done = subprocess.run(
        [*command, "--temperature", "0", "--max_tokens", "9"],
        input=f"{PROMPT}\n".encode(),
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    expected = "".join(api.generate(fit_run, PROMPT, max_tokens=9, temperature=0))
    assert done.stdout.decode() == f"{PROMPT}{expected}\n"


@pytest.mark.slow
def test_a_reader_that_has_gone_ends_it_quietly(fit_run: Path) -> None:
    command = [sys.executable, "-m", "nanofed", "generate", "--checkpoint", str(fit_run), "--prompt", "fox"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--checkpoint", "nowhere"], 2, "there is no checkpoint in nowhere"),
        (["--checkpoint", "https://example.org/run"], 2, "is a URL"),
        (["--max_tokens", "100000"], 2, "exceed the 320 positions"),
        (["--device", "toaster"], 2, "--device toaster cannot be used here"),
        (["--device", "cuda:99"], 2, "--device cuda:99 cannot be used here"),
    ],
)
def test_bad_input_is_one_line_and_no_output(
    options: list[str], code: int, message: str, fit_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()  # what the fixture's training said
    base = ["generate", "--prompt", "p"] + ([] if "--checkpoint" in options else ["--checkpoint", str(fit_run)])
    assert cli.main([*base, *options]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_standard_input_that_is_not_text(
    fit_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert cli.main(["generate", "--checkpoint", str(fit_run), "--prompt", "-"]) == 2
    assert "standard input is not UTF-8 text" in capsys.readouterr().err


def test_a_file_of_prompts_in_its_order(fit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [PROMPT, "fox", "", "lazy wizards mix"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8-sig")  # as Windows writes it
    file = ["--checkpoint", str(fit_run), "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu"]
    options = ["--max_tokens", "9", "--temperature", "0", "--batch_size", "3"]
    expected = list(api.complete(fit_run, prompts, max_tokens=9, temperature=0, batch_size=3))
    assert [one.prompt for one in expected] == prompts
    assert said(capsys, *file, *options) == "".join(f"{one.prompt}{one.text}\n" for one in expected)
    lines = said(capsys, *file, *options, "--jsonl").splitlines()
    assert all(line.isascii() for line in lines)  # JSON whatever the terminal's encoding is
    assert [json.loads(line) for line in lines] == [asdict(one) for one in expected]


def test_a_stop_token_ends_the_text(fit_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [
        "--checkpoint",
        str(fit_run),
        "--prompt",
        PROMPT,
        "--max_tokens",
        "30",
        "--device",
        "cpu",
        "--top_p",
        "0.95",
    ]
    before, stop, after = said(capsys, *base).partition(" the")
    assert stop and after
    assert said(capsys, *base, "--stop", stop) == f"{before}\n"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--prompt", "p", "--prompts", "f"], 2, "--prompt and --prompts: give one of them"),
        (["--prompt", "p", "--jsonl"], 2, "--jsonl writes what follows a file of prompts"),
        (["--prompts", "no-such-file"], 3, "--prompts no-such-file: No such file or directory"),
        (["--prompt", "p", "--stop", "quick fox"], 2, "tokens and has to be one; special tokens are <|bos|>"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    options: list[str], code: int, message: str, fit_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.main(["generate", "--checkpoint", str(fit_run), *options]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_without_a_prompt_and_a_terminal_it_shows_the_usage(fit_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "--checkpoint", str(fit_run)])
    assert "standard input is no terminal" in capsys.readouterr().err


class Terminal:
    """`nanofed generate` in a pseudo-terminal of its own, so that Ctrl-C and Ctrl-D mean what they do to a person."""

    # the new session takes the terminal as its own, which is what sends it signals
    TAKE = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )

    def __init__(self, *options: str) -> None:
        self.master, inside = os.openpty()
        command = [sys.executable, "-m", "nanofed", "generate", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.TAKE, *command],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            env={**os.environ, "PYTHONUTF8": "1", "TERM": "dumb"},
        )
        os.close(inside)
        self.unread = b""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def until(self, text: str, again: str = "") -> str:
        """Wait for a text and return what was written up to its end.

        again: keys that are pressed once more every ten seconds. Python does not see a Ctrl-C that comes in the moment
            between readline's prompt and its wait for a key, and takes it for one of the line that is typed next.
        """
        started = pressed = time.monotonic()
        while text.encode() not in self.unread:
            now = time.monotonic()
            assert now < started + 120, self.unread
            if again and now > pressed + 10:
                pressed = now
                self.type(again)
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.unread += os.read(self.master, 4096)
                except OSError as error:  # EIO: the other end is closed
                    raise AssertionError(self.unread) from error
        before, _, self.unread = self.unread.partition(text.encode())
        return (before.decode(errors="replace") + text).replace("\r\n", "\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.mark.slow
def test_a_dialogue_in_a_terminal(fit_run: Path) -> None:
    """Prompts, /help, options, history with Ctrl-P; Ctrl-C ends a text and not the program, Ctrl-D the program."""
    loaded = api.load(fit_run)
    short, long = ("".join(api.generate(loaded, "fox", max_tokens=n, temperature=0)) for n in (5, 310))
    terminal = Terminal("--checkpoint", str(fit_run), "--max_tokens", "5", "--temperature", "0", "--device", "cpu")
    try:
        assert "/help lists" in terminal.until("\n> ")
        terminal.type("fox\n")
        assert terminal.until("\n> ") == f"fox\nfox{short}\n> "
        terminal.type("\x10\n")
        assert f"fox{short}\n" in terminal.until("\n> ")
        terminal.type("/help\n")
        assert "/seed 44" in terminal.until("\n> ")  # each text has the next seed
        terminal.type("/nonsense\n")
        assert "there is no /nonsense" in terminal.until("\n> ")
        terminal.type("/temperature hot\n")
        assert "/temperature must be a number, not 'hot'" in terminal.until("\n> ")
        terminal.type("/max_tokens 1000\n")
        terminal.until("\n> ")
        terminal.type("fox\n")
        assert "exceed the 320 positions" in terminal.until("\n> ")
        terminal.type("/max_tokens 310\n")
        terminal.until("\n> ")
        for _ in range(20):  # a text takes a fraction of a second: Ctrl-C may come too late once
            terminal.type("fox\n")
            terminal.until(f"fox{long[:3]}", again="fox\n")
            terminal.type("\x03")
            if long[3:] not in terminal.until("\n> "):
                break
        else:
            raise AssertionError("Ctrl-C never ended a text")
        terminal.type("half a line\x03")
        terminal.until("\n> ", again="\x03")
        assert terminal.process.poll() is None
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
