"""Weights & Biases gets what TensorBoard gets: read from the file that wandb writes without a network."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanofed import cli, runtime
from nanofed.training.event_files import OTHER_AXES
from tests.cli.conftest import Corpus

BLOCK, HEAD = 32768, 7  # LevelDB's log format: checksum, length and type before every fragment of a record
Points = dict[tuple[str, int], float]


def records(path: Path) -> Iterator[Any]:
    Record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    content, position, whole = path.read_bytes(), HEAD, b""
    while position + HEAD <= len(content):
        if BLOCK - position % BLOCK < HEAD:  # no head begins there
            position += BLOCK - position % BLOCK
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        whole += content[position + HEAD : position + HEAD + length]
        position += HEAD + length
        if kind in (1, 4):  # whole, or a last fragment
            yield Record.FromString(whole)
            whole = b""


def wandb_runs(run: Path) -> tuple[list[Any], Points]:
    """Return the run's records of each start, and all scalars as TensorBoard has them."""
    starts, points = [], {}
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        found = list(records(path))
        starts.append(found)
        for record in found:
            if record.WhichOneof("record_type") == "history":
                row = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
                (tag,) = [name for name in row if "/" in name]
                axis = next((name for name in OTHER_AXES if tag.endswith(name)), "by_step").removeprefix("by_")
                points[tag, row[axis]] = row[tag]
    return starts, points


def last(found: list[Any], kind: str) -> Any:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind][-1]


def check_scalars(run: Path, points: Points) -> None:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    # As they were written: the files of one second are read in the order of a counter without leading zeros.
    written = sorted(
        ((point.wall_time, tag, point) for tag in tags for point in events.Scalars(tag)), key=lambda one: one[0]
    )
    shown = {(tag, point.step): point.value for _, tag, point in written}
    assert points == pytest.approx(shown, rel=1e-6)  # TensorBoard's values are of 32 bits
    assert {"val/bpb", "bpb/by_tokens", "train/loss"} <= set(tags)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_a_fit_that_goes_on_is_one_run_there_and_a_replaced_one_another(corpus: Corpus, tmp_path: Path) -> None:
    options = [f"--runs_dir={tmp_path}", "--wandb_project=project", "--run_name=first", "--log_every=1"]
    run, command = tmp_path / "fit", corpus.start("fit", *options)
    assert cli.main([*command, "--model.recipe.num_steps=2"]) == 0
    assert cli.main([*command, "--ckpt_path=last"]) == 0
    starts, points = wandb_runs(run)
    check_scalars(run, points)
    there = {
        (last(found, "run").run_id, last(found, "run").project, last(found, "run").display_name) for found in starts
    }
    assert there == {((run / "wandb-id.txt").read_text().strip(), "project", "first")}
    config = {item.key or item.nested_key[0]: item.value_json for item in last(starts[1], "run").config.update}
    assert json.loads(config["model"])["recipe"]["num_steps"] == 4
    summary = {i.key: i.value_json for record in starts[1] for i in record.summary.update}
    assert json.loads(summary["bpb_end"]) == json.loads((run / "summary.json").read_text())["bpb_end"]
    assert cli.main([*command, "--overwrite=true"]) == 0
    (found,), _ = wandb_runs(run)
    assert last(found, "run").run_id not in {identity for identity, *_ in there}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["fit"]


def test_in_a_federation_the_server_logs(corpus: Corpus, tmp_path: Path) -> None:
    assert cli.main(corpus.start("federate", f"--runs_dir={tmp_path}", "--wandb_project=project")) == 0
    (found,), points = wandb_runs(tmp_path / "federate")
    check_scalars(tmp_path / "federate", points)
    assert last(found, "run").display_name == "federate"
    assert any(tag == "fed/clients_merged" for tag, _ in points)
    assert last(found, "exit").exit_code == 0


@pytest.mark.parametrize("command", ["fit", "federate"])
def test_without_the_package_a_person_is_told_how_to_install_it(
    command: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(corpus.start(command, f"--runs_dir={tmp_path}", "--wandb_project=project")) == 2
    assert "--wandb_project needs wandb: pip install 'nanofed-lightning[wandb]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_who_is_not_logged_in_is_told_before_a_run_begins(corpus: Corpus, tmp_path: Path) -> None:
    command = runtime.python(
        "-m", "nanofed", *corpus.start("fit", f"--runs_dir={tmp_path}/runs", "--wandb_project=project")
    )
    alone = runtime.environment(HOME=str(tmp_path), WANDB_MODE="online", WANDB_API_KEY=None, NETRC=None)
    done = subprocess.run(command, env=alone, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search("^nanofed fit: --wandb_project project: .*wandb login", done.stderr, re.MULTILINE), done.stderr
    assert not (tmp_path / "runs").exists()
