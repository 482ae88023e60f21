"""A real bash completes nanofed's command lines, at once."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest

from nanofed import cli
from tests.support import ended


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "nanofed.bash"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as output:
        patch.setattr("sys.stdout", output)
        assert cli.main(["completion", "bash"]) == 0
    return path


def completed(script: Path, line: str) -> list[str]:
    """Return what TAB offers at the end of a line."""
    words = line.split(" ")
    typed = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}"
    code = f'source {script} && {typed} && _nanofed; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = ended(["bash", "--norc", "-c", code])
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("nanofed ", [*cli.COMMANDS]),
        ("nanofed fe", ["federate"]),
        ("nanofed data ", ["download", "demo", "pack", "list", "verify", "--help"]),
        ("nanofed data download", ["download"]),
        ("nanofed data download --nu", ["--num_shards"]),
        ("nanofed fit --config configs/tiny.yaml --model.recipe.nu", ["--model.recipe.num_steps"]),
        ("nanofed federate --federation.outer_l", ["--federation.outer_lr"]),
        ("nanofed federate --pl", ["--plan"]),
        ("nanofed site --sup", ["--superlink"]),
        ("nanofed site --federation.shar", ["--federation.sharding"]),
        ("nanofed server init keys --si", ["--site"]),
        ("nanofed export runs/ti", []),  # files, by bash itself
    ],
)
def test_tab_offers(line: str, offered: list[str], script: Path) -> None:
    assert completed(script, line) == offered


def test_it_is_fast_and_files_are_completed_where_nothing_else_is(script: Path) -> None:
    started = time.perf_counter()
    completed(script, "nanofed fit --model.")
    assert time.perf_counter() - started < 0.2
    assert "-o default" in ended(["bash", "--norc", "-c", f"source {script} && complete -p nanofed"]).stdout


def test_zsh_is_told_to_read_it(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "zsh"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert "bashcompinit" in first and rest == script.read_text().splitlines()
