from __future__ import annotations

import json
from pathlib import Path

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
