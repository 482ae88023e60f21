from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanofed.errors import ConfigError, NanofedError
from nanofed.training.checkpoint import CheckpointError
from nanofed.training.options import RunOptions
from nanofed.training.run import CONFIG, SUMMARY, Point, Summary, open_run, resume_checkpoint
from tests.small_checkpoint import save_small


def options(folder: Path, **changes: Any) -> RunOptions:
    return RunOptions(**{"name": "run", "runs_dir": str(folder), **changes})


def test_a_new_run_has_its_config_in_it(tmp_path: Path) -> None:
    run = open_run(options(tmp_path / "deep" / "runs"), "depth: 4\n")
    assert run == tmp_path / "deep" / "runs" / "run" and (run / CONFIG).read_text() == "depth: 4\n"
    assert [path.name for path in run.iterdir()] == [CONFIG]


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    run = open_run(options(tmp_path), "first")
    (run / "events").write_text("precious")
    with pytest.raises(ConfigError, match=r"already holds a run: go on with --ckpt_path last"):
        open_run(options(tmp_path), "second")
    assert (run / CONFIG).read_text() == "first" and (run / "events").exists()
    open_run(options(tmp_path, ckpt_path="last"), "resumed")
    assert (run / CONFIG).read_text() == "resumed" and (run / "events").exists()
    open_run(options(tmp_path, overwrite=True), "anew")
    assert (run / CONFIG).read_text() == "anew" and not (run / "events").exists()


def test_overwriting_spares_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    open_run(options(tmp_path, overwrite=True), "config")
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc"])
def test_a_name_is_a_plain_folder_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        open_run(options(tmp_path, name=name), "config")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NanofedError, match=r"file/run cannot be written: .*choose another --runs_dir"):
        open_run(options(tmp_path / "file"), "config")


def test_the_last_checkpoint_is_the_newest_that_verifies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = open_run(options(tmp_path), "config")
    assert resume_checkpoint(run, None) is None
    assert resume_checkpoint(run, "last") is None, "a run that was stopped before its first checkpoint starts anew"
    paths = [save_small(run / "checkpoints" / f"step_{step:08d}", step, 10) for step in (10, 80, 90)]
    (run / "checkpoints" / ".step_00000095.77.tmp").mkdir()
    assert resume_checkpoint(run, "last") == resume_checkpoint(run, str(run)) == paths[2] and not caplog.records
    (paths[2] / "manifest.json").unlink()
    (paths[1] / "state.pt").write_bytes(b"")
    for _ in range(2):
        assert resume_checkpoint(run, "last") == resume_checkpoint(run, str(run)) == paths[0]
    skipped = [record.getMessage() for record in caplog.records]
    assert len(skipped) == 2, "one line a damaged one, however often they are looked for"
    assert "step_00000090 is no whole checkpoint: manifest.json cannot be read" in skipped[0]
    assert "step_00000080/state.pt has another size" in skipped[1] and skipped[1].endswith(f"checkpoint is {paths[0]}")
    (paths[0] / "model.safetensors").unlink()
    for where in ("last", str(run)):
        with pytest.raises(
            CheckpointError,
            match=r"run/checkpoints holds no checkpoint that is whole: step_00000090 .*_00000080/.*_00000010/",
        ):
            resume_checkpoint(run, where)
    with pytest.raises(ConfigError, match="is a URL"):
        resume_checkpoint(run, "https://example.org/last")
    with pytest.raises(ConfigError, match="is a URL"):
        options(tmp_path, runs_dir="s3://bucket/runs")


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
