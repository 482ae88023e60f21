"""A profile adds up, its trace can be read, and it leaves nothing else behind."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from nanofed import cli
from tests.cli.conftest import Corpus, corpus  # noqa: F401


def test_a_profile_says_where_a_step_goes_and_writes_a_trace(
    corpus: Corpus,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [f"--runs_dir={tmp_path}/runs", "--steps=2", "--warm_up=1", "--output=seen.json.gz"]
    accumulated = ["--data.device_batch_size=4", "--model.recipe.batch_tokens=512"]
    assert cli.main(corpus.start("profile", *options, *accumulated)) == 0
    said = capsys.readouterr().out
    whole = float(re.findall(r"^a step of 512 tokens takes ([\d.,]+) ms", said, re.MULTILINE)[0].replace(",", ""))
    rows = dict(re.findall(r"^(data|forward|backward|optimizer|rest) +([\d.]+) ", said, re.MULTILINE))
    assert sum(map(float, rows.values())) == pytest.approx(whole, rel=0.01, abs=0.1)  # a median of two is their mean
    assert float(rows["forward"]) > 0 < float(rows["backward"])
    assert re.search(r"^aten::mm +[\d.]+ +[\d.]+% +\d+$", said, re.MULTILINE)
    events = json.loads(gzip.decompress((tmp_path / "seen.json.gz").read_bytes()))["traceEvents"]
    spans = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    counts = {phase: spans.count(phase) for phase in ("forward", "backward", "optimizer")}
    assert counts == {"forward": 8, "backward": 8, "optimizer": 2}  # 4 micro-batches of 4 x 32 in each of 2 steps
    assert [path.name for path in tmp_path.iterdir()] == ["seen.json.gz"]


def test_a_trace_without_a_folder_is_refused_at_once(
    corpus: Corpus,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(corpus.start("profile", f"--output={corpus.data}")) == 2
    assert f"the trace cannot be written: {corpus.data} is a folder, name a file" in capsys.readouterr().err
    assert cli.main(corpus.start("profile", "--output=/proc/seen.json", "--steps=1", "--warm_up=1")) == 1
    assert "the trace cannot be written to /proc/seen.json" in capsys.readouterr().err
    assert cli.main(corpus.start("profile", "--output=nowhere/seen.json.gz")) == 2
    assert "the trace cannot be written: there is no folder nowhere" in capsys.readouterr().err
