"""--help, --print_config and the saved config of the commands that take one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nanofed import cli
from nanofed.training.summary import CONFIG, Summary
from tests.cli.conftest import Corpus


def printed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    captured = capsys.readouterr()
    assert (end.value.code, captured.err) == (0, "")
    return captured.out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("fit", ["--trainer.devices", "--model.depth", "--data.path", "--ckpt_path", "--eval_every"]),
        ("validate", ["--trainer.devices", "--model.depth", "--data.path", "--ckpt_path"]),
        ("federate", ["--federation.round_seconds", "--fabric.devices", "--model.depth", "--data.path", "--init_from"]),
        ("generate", ["--checkpoint", "--prompt", "--temperature", "--top_k", "--seed", "--max_tokens", "--device"]),
    ],
)
def test_help(command: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed([command, "--help"], capsys)
    assert shown.startswith(f"usage: nanofed {command}")
    for option in options:
        assert f"  {option} " in shown


@pytest.mark.parametrize("command", ["fit", "validate", "federate"])
def test_print_config_shows_the_resolved_config_and_runs_nothing(
    command: str, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = f"--runs_dir={tmp_path / 'runs'}"
    shown = printed(corpus.start(command, runs, "--model.depth=3", "--print_config"), capsys)
    resolved = yaml.safe_load(shown)
    assert resolved["model"]["depth"] == 3
    assert resolved["model"]["recipe"]["num_steps"] == 4
    assert resolved["data"]["path"] == str(corpus.data)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "printed.yaml").write_text(shown)
    assert printed([command, "--config", str(tmp_path / "printed.yaml"), "--print_config"], capsys) == shown


@pytest.mark.parametrize("command", ["fit", "federate"])
def test_a_saved_config_makes_the_run_again(command: str, fit_run: Path, federated_run: Path, tmp_path: Path) -> None:
    run = fit_run if command == "fit" else federated_run
    assert cli.main([command, "--config", str(run / CONFIG), f"--runs_dir={tmp_path}"]) == 0
    first, again = Summary.read(run), Summary.read(tmp_path / command)
    assert [point.bpb for point in again.curve] == [point.bpb for point in first.curve]
    assert len(again.curve) >= 2
