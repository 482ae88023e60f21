"""How a process ended is read by who started it: of this run alone, and as the error that it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanofed.errors import ConfigError, DataError, NanofedError
from nanofed.federated.outcome import FILE, Outcome


@pytest.mark.parametrize("error", [ConfigError("a"), DataError("b"), NanofedError("c")])
def test_an_error_arrives_as_what_it_was(error: NanofedError, tmp_path: Path) -> None:
    Outcome.of(error, run_id=7).write(tmp_path)
    outcome = Outcome.read(tmp_path, run_id=7)
    assert outcome is not None and outcome.exit_code == error.exit_code
    assert type(outcome.error()) is type(error) and str(outcome.error()) == str(error)
    assert Outcome.read(tmp_path, run_id=8) is None
    Outcome.clear(tmp_path)
    assert Outcome.read(tmp_path, run_id=7) is None


def test_a_bug_is_exit_code_1_in_one_line() -> None:
    assert Outcome.of(RuntimeError("the device is lost\nmore")) == Outcome(1, "the device is lost")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"exit_code": 2}', '{"exit_code": 2, "reason": "", "more": 1}'])
def test_what_is_no_outcome_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    assert Outcome.read(tmp_path) is None
