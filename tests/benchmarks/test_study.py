from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from nanofed.data.shards import all_texts, open_dataset
from tests.benchmarks.machine import ROOT
from tests.benchmarks.study import Study, main, summarise

STUDY: dict[str, Any] = {
    "vocab_size": 300,
    "seeds": [1, 2],
    "reference": "one machine",
    "common": {
        "model.depth": 1,
        "model.sequence_len": 32,
        "model.recipe.batch_tokens": 128,
        "model.recipe.num_steps": 4,
        "data.device_batch_size": 2,
        "data.eval_tokens": 512,
    },
    "runs": {"one machine": {"command": "fit"}},
    "axes": [
        {"M = 1": {"federation.clients": 1}, "M = 2": {"federation.clients": 2}},
        {"FedAvg": {"federation.outer": "fedavg", "federation.round_steps": 1}},
    ],
}


def test_runs_are_the_single_ones_and_every_combination_for_each_text_and_seed() -> None:
    runs = Study(**STUDY).plan(["texts/a", "b"])
    assert len(runs) == 2 * 2 * 3
    assert [run.label for run in runs[:3]] == ["one machine", "M = 1, FedAvg", "M = 2, FedAvg"]
    assert (runs[0].command, runs[2].command) == ("fit", "federate")
    assert re.fullmatch("a-M-2-FedAvg-1-[0-9a-f]{6}", runs[2].name)
    assert runs[2].options["federation.clients"] == 2
    assert len({run.name for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read as a study"),
        ("{", "cannot be read as a study"),
        ("axis: []", "axis"),
        ("axes: 3", "axes"),
        ("{runs: {a: {command: nonsense}}}", "the command of 'a' is fit or federate, not 'nonsense'"),
        ("{runs: {a: {}}, reference: b}", "the reference 'b' is none of a"),
    ],
)
def test_what_is_no_study_is_refused_by_name(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.yaml"
    if content is not None:
        file.write_text(content)
    assert main([str(file), "--folder", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_can_be_planned(path: Path) -> None:
    runs = Study.read(path).plan(["a"])
    assert len({run.name for run in runs}) == len(runs)


@pytest.mark.slow
def test_a_study_runs_compares_and_goes_on(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "study.yaml", tmp_path / "out"
    parts = {str(tmp_path / "texts" / name): corpus for name in "ab"}
    file.write_text(yaml.safe_dump({**STUDY, "seeds": [1], "domains": parts}))
    command = [str(file), "--folder", str(folder)]
    assert main([*command, "--only", "one machine|M = 1"]) == 0
    (summary,) = folder.glob("*-one-machine-1-*/summary.json")
    before = summary.stat().st_mtime_ns
    assert main(command) == 0
    assert summary.stat().st_mtime_ns == before
    results = pq.read_table(folder / "results.parquet")
    rows = {row["variant"]: row for row in results.to_pylist()}
    assert rows.keys() == {"one machine", "M = 1, FedAvg", "M = 2, FedAvg"}
    assert rows["one machine"]["gap"] == 0
    assert all(row["tokens"] == 512 for row in rows.values())
    assert all(min(row["domains"]) <= row["bpb"] <= max(row["domains"]) for row in rows.values())
    union, *own = (open_dataset(tmp_path / "texts" / name) for name in ("union", *"ab"))
    assert sorted(all_texts(union.validation)) == sorted(text for part in own for text in all_texts(part.validation))
    assert summarise(results) in capsys.readouterr().out
