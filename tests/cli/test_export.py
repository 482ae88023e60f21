from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nanofed
from nanofed import cli


def test_out_and_in_again(fit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, back = tmp_path / "out", tmp_path / "runs" / "back"
    assert cli.main(["export", str(fit_run), "--to", "nanochat", str(out)]) == 0
    assert capsys.readouterr() == (f"exported to {out}\n", "")
    assert cli.main(["import", str(out), "--name", "back", "--runs_dir", str(back.parent)]) == 0
    said, error = capsys.readouterr()
    assert said.splitlines()[-1] == f"imported as {back / 'checkpoints' / 'step_00000004'}"
    assert error == ""
    here, there = nanofed.load(fit_run).model.state_dict(), nanofed.load(back).model.state_dict()
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["export", "nowhere", "out"], 2, "nanofed export: there is no checkpoint in nowhere"),
        (["export", "{run}", "{run}"], 2, "is there already: choose another name, or remove it"),
        (["export", "{run}", "."], 2, ". is no name of a file or folder to make"),
        (["export", "{run}", "out", "--push", "me"], 2, "name the repository as OWNER/NAME"),
        (["import", "nowhere", "--name", "a"], 2, "nanofed import: there is no checkpoint in nowhere"),
        (["import", "{run}", "--name", "a"], 2, "is nanofed's own"),
        (["import", "nowhere", "--name", "a/b"], 2, "is not a plain folder name"),
        (["import", "nowhere", "--name", "a", "--step", "-1"], 2, "--step must be at least 0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    arguments: list[str],
    code: int,
    said: str,
    fit_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([argument.format(run=fit_run) for argument in arguments]) == code
    out, error = capsys.readouterr()
    assert said in error and error.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []
