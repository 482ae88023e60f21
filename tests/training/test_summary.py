from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nanofed.errors import ConfigError
from nanofed.training.summary import SUMMARY, Point, Summary


def test_a_summary_goes_and_comes(tmp_path: Path) -> None:
    summary = Summary("run", "fit", tokens=4096, seconds=1.5)
    assert summary.bpb_start is None and summary.bpb_end is None
    for step, bpb in ((0, 3.0), (10, 2.5), (20, 2.0)):
        summary.add(Point(step, step * 100, step / 10, bpb))
    summary.write(tmp_path)
    assert Summary.read(tmp_path) == summary
    content = json.loads((tmp_path / SUMMARY).read_text())
    assert (content["bpb_start"], content["bpb_end"]) == (3.0, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == [SUMMARY]


def test_a_resumed_run_replaces_what_it_repeats() -> None:
    summary = Summary("run", "fit")
    for step in (0, 10, 20, 30):
        summary.add(Point(step, step, 0.0, 3.0))
    summary.add(Point(20, 20, 0.0, 2.0))
    assert [(point.step, point.bpb) for point in summary.curve] == [(0, 3.0), (10, 3.0), (20, 2.0)]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"name": 1}', '{"name": "a", "kind": "fit", "curve": [1]}'])
def test_a_summary_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / SUMMARY).write_text(content)
    with pytest.raises(ConfigError, match=r"no readable summary\.json"):
        Summary.read(tmp_path)
    with pytest.raises(ConfigError):
        Summary.read(tmp_path / "absent")


def test_runs_are_drawn_on_the_same_axes_by_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    pytest.importorskip("matplotlib")
    one = Summary("one", "fit", curve=[Point(0, 0, 0.0, 3.0), Point(5, 100, 2.0, 2.0)])
    two = Summary("two", "federated", curve=[Point(0, 0, 0.0, 3.0), Point(1, 100, 4.0, 2.5, 1000)])
    axes = two.plot("seconds", axes=one.plot("seconds"))
    drawn = [(str(line.get_label()), np.asarray(line.get_xydata()).tolist()) for line in axes.get_lines()]
    assert drawn == [("one", [[0.0, 3.0], [2.0, 2.0]]), ("two", [[0.0, 3.0], [4.0, 2.5]])]
    assert axes.get_xlabel() == "seconds of training"


def test_a_notebook_shows_a_table_in_which_a_name_is_no_markup() -> None:
    shown = Summary("<b>run</b>", "fit", 1234, 5.0, curve=[Point(0, 0, 0.0, 3.0)])._repr_html_()
    assert "&lt;b&gt;run" in shown and "<b>" not in shown and "1,234" in shown and "3.0000" in shown
    assert "not measured" in Summary("run", "fit")._repr_html_()
