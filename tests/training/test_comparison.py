from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanofed.cli import main
from nanofed.errors import ConfigError
from nanofed.training.comparison import Comparison
from nanofed.training.summary import CONFIG, Point, Summary


def run(folder: Path, name: str, curve: list[tuple[int, float, float, int]], **options: Any) -> Path:
    """A run's folder with a curve of (tokens, seconds, bits per byte, bytes)."""
    path = folder / name
    path.mkdir()
    points = [Point(step, *point[:3], point[3]) for step, point in enumerate(curve)]
    last = points[-1]
    kind = "federated" if last.bytes else "fit"
    Summary(name, kind, last.tokens, last.seconds, last.bytes, points, "the horizon is reached").write(path)
    config = {"model": {"depth": 2, "sequence_len": 256}, "data": {"eval_tokens": 1000, **options}}
    (path / CONFIG).write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        run(tmp_path, "one", [(0, 0, 4.0, 0), (100, 10, 3.0, 0), (200, 20, 2.0, 0)]),
        run(tmp_path, "two", [(0, 0, 4.0, 0), (100, 5, 3.2, 500), (300, 15, 2.2, 1500)], device_batch_size=4),
        run(tmp_path, "three", [(0, 0, 4.0, 0), (250, 40, 2.5, 1000)]),
    ]


def test_runs_are_held_to_the_first_where_the_shortest_ends(runs: list[Path]) -> None:
    comparison = Comparison(runs)
    header, one, two, three = comparison.rows()
    assert header[-3:] == ["at 200 tokens", "at 15 s", "at 1 kB"]
    assert one[-3:] == ["2.0000", "2.5000", "-"], "what sent nothing has no place among bytes"
    assert two[-3:] == ["2.7000 (+35.00 %)", "2.2000 (-12.00 %)", "2.7000"]
    assert three[-3:] == ["2.8000 (+40.00 %)", "3.4375 (+37.50 %)", "2.5000 (-7.41 %)"]


def test_runs_of_other_texts_are_said_to_be(tmp_path: Path, runs: list[Path]) -> None:
    assert all("no checkpoints" in warning for warning in Comparison(runs).warnings())
    other = run(tmp_path, "other", [(0, 0, 4.0, 0), (100, 10, 3.0, 0)], eval_tokens=500)
    warning = Comparison([runs[0], other]).warnings()[0]
    assert "other was measured on other text than one: data.eval_tokens 1000 -> 500" in warning


def test_the_page_needs_nothing_else_and_shows_names_as_they_are(tmp_path: Path, runs: list[Path]) -> None:
    strange = run(tmp_path, "a<b>&c", [(0, 0, 4.0, 0), (100, 10, 3.0, 0)])
    page = Comparison([*runs, strange]).page()
    assert page.count("<svg") == 3
    assert "a&lt;b&gt;&amp;c" in page
    assert "<b>&c" not in page
    assert "http" not in page
    assert "src=" not in page


def test_the_command_prints_and_writes(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    assert main(["compare", *map(str, runs[:2]), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "2.7000 (+35.00 %)" in said
    assert "two differs in 0 options" in said
    assert output.read_text().startswith("<!doctype html>")
    for name in ("page.pdf", "nowhere/page.html"):
        assert main(["compare", *map(str, runs[:2]), "--output", str(tmp_path / name)]) == 2


def test_what_cannot_be_compared_is_refused(tmp_path: Path, runs: list[Path]) -> None:
    with pytest.raises(ConfigError, match="two runs or more"):
        Comparison(runs[:1])
    with pytest.raises(ConfigError, match="is it a run folder"):
        Comparison([runs[0], tmp_path])
    short = run(tmp_path, "short", [(0, 0, 4.0, 0)])
    with pytest.raises(ConfigError, match="no curve yet"):
        Comparison([runs[0], short])
    (runs[1] / CONFIG).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        Comparison(runs)


def test_a_summary_of_an_older_nanofed_has_sent_nothing(runs: list[Path]) -> None:
    content = json.loads((runs[1] / "summary.json").read_text())
    del content["bytes"]
    for point in content["curve"]:
        del point["bytes"]
    (runs[1] / "summary.json").write_text(json.dumps(content))
    assert Summary.read(runs[1]).bytes == 0
    assert Comparison(runs[:2]).common("bytes") is None


def test_a_damaged_checkpoint_says_nothing_of_the_text(runs: list[Path]) -> None:
    (runs[0] / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert Comparison(runs).runs[0].text is None


def test_a_run_that_sent_nothing_has_no_curve_by_bytes(runs: list[Path]) -> None:
    by_bytes = Comparison(runs).page().split("<svg")[3]
    assert by_bytes.count("<polyline") == 2


def test_a_run_is_not_compared_where_it_has_not_begun(tmp_path: Path, runs: list[Path]) -> None:
    """One that goes on with an imported model begins beyond the end of one that ended early."""
    content = json.loads((runs[0] / "summary.json").read_text()) | {"init_from": "runs/other"}
    (runs[0] / "summary.json").write_text(json.dumps(content))
    later = run(tmp_path, "later", [(250, 0, 2.4, 0), (400, 30, 2.0, 0)])
    comparison = Comparison([runs[0], later])
    assert comparison.common("tokens") is None
    assert "one began with the weights of runs/other" in comparison.warnings()[0]
    assert "later began with a model of 250 tokens" in comparison.warnings()[1]
    header, *rows = Comparison([*runs, later]).rows()
    assert [row[header.index("at 200 tokens")] for row in rows][-1] == "-"
