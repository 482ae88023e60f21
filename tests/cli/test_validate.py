"""`nanofed validate` on checkpoints of both paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanofed import api, cli
from nanofed.training.checkpoint.format import find_checkpoint
from nanofed.training.summary import Summary
from tests.cli.conftest import Corpus


def said(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert cli.main(["validate", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("path", ["fit", "federate"])
def test_says_what_the_run_came_to(
    path: str, corpus: Corpus, fit_run: Path, federated_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit_run if path == "fit" else federated_run
    end = Summary.read(run).bpb_end
    assert end is not None
    base = ["--config", str(corpus.fit)]
    assert said(capsys, *base, f"--ckpt_path={run}") == f"{end:.4f} bits per byte\n"
    assert said(capsys, *base, f"--ckpt_path={find_checkpoint(run)}") == f"{end:.4f} bits per byte\n"
    by_name = [f"--runs_dir={run.parent}", f"--name={path}", "--ckpt_path=last"]
    assert said(capsys, *base, *by_name) == f"{end:.4f} bits per byte\n"
    assert api.validate(corpus.fit, overrides={"ckpt_path": str(run)}) == pytest.approx(end, abs=1e-12)


def test_writes_nothing(
    corpus: Corpus, fit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in fit_run.rglob("*"))
    said(capsys, "--config", str(corpus.fit), f"--ckpt_path={fit_run}", "--runs_dir=runs")
    assert list(tmp_path.iterdir()) == []
    assert sorted(path for path in fit_run.rglob("*")) == before


def test_reads_as_many_tokens_as_it_is_told(corpus: Corpus, fit_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--config", str(corpus.fit), f"--ckpt_path={fit_run}"]
    assert said(capsys, *base, "--data.eval_tokens=256") != said(capsys, *base, "--data.eval_tokens=1024")
