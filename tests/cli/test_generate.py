from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
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
