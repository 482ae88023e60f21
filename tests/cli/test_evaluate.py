"""`nanofed evaluate`, and CORE while a run of either path trains."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nanofed
from nanofed import api, cli
from nanofed.training.checkpoint.format import find_checkpoint
from nanofed.training.summary import Summary
from tests.cli.conftest import Corpus
from tests.evaluation.small_bundle import write_bundle
from tests.support import REPOSITORY, ended


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("core") / "bundle")


def points(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run))
    events.Reload()
    found = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    # Files are read by name, in which the tenth writer of a process stands before its ninth.
    return [(event.step, event.value) for event in sorted(found, key=lambda event: event.wall_time)]


def test_bits_per_byte_are_the_runs_own(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    paths = [str(runs / "fit"), str(runs / "federate")]
    assert cli.main(["evaluate", *paths, f"--json={output}"]) == 0
    ends = [Summary.read(Path(path)).bpb_end for path in paths]
    found = json.loads(output.read_text())
    assert [entry["bpb"] for entry in found] == ends
    assert [entry["core"] for entry in found] == [None, None]
    assert [entry["tokens"] for entry in found] == [2048, 2048]
    said = capsys.readouterr().out
    assert all(f"bits per byte {end:.4f}" in said for end in ends)


@pytest.mark.parametrize("path", ["fit", "federate"])
def test_core_is_a_table_json_and_in_tensorboard(
    path: str, runs: Path, bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, output = runs / path, tmp_path / "out.json"
    assert cli.main(["evaluate", str(run), "--core", f"--core_data={bundle}", f"--json={output}"]) == 0
    (found,) = json.loads(output.read_text())
    core = found["core"]
    assert found["bpb"] is None and core["interval"][0] <= core["core"] <= core["interval"][1]
    assert [task["label"] for task in core["tasks"]] == ["copa", "winograd", "lambada_openai", "piqa"]
    said = capsys.readouterr().out
    assert f"CORE{' ':<56}" in said.replace("\n", " ") or f"{core['core']:7.4f}" in said
    assert "partial: without 18 of CORE's tasks" in said
    for tag, place in (("core/metric", found["step"]), ("core/metric_by_tokens", found["tokens"])):
        ((at, value),) = points(run, tag)
        assert at == place and value == pytest.approx(core["core"], abs=1e-6)
    assert points(run, "core/task/copa")
    same = nanofed.evaluate(run, bpb=False, core=True, core_data=bundle)
    assert same.core is not None and same.core.core == core["core"] and same.core.bundle == core["bundle"]


def test_what_cannot_be_is_one_line_and_writes_nothing(
    runs: Path, bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    run = runs / "fit"
    lone = tmp_path / "lone"
    shutil.copytree(find_checkpoint(run), lone)
    output = f"--json={tmp_path / 'out.json'}"
    for code, words, command in [
        (3, "nanofed data download --core", [str(run), "--core"]),
        (2, "there is no checkpoint in", [str(tmp_path)]),
        (2, "there is no checkpoint in", [str(run), str(tmp_path / "typo")]),
        (2, "name a text with --data", [str(lone)]),
        (2, "there is no folder", [str(run), f"--json={tmp_path}/none/out.json"]),
        (2, "is a folder: name a file", [str(run), f"--json={tmp_path}"]),
        (2, "--core_examples must be", [str(run), "--core_examples=-1"]),
    ]:
        assert cli.main(["evaluate", *command, *([] if "--json" in command[-1] else [output])]) == code
        said = capsys.readouterr()
        assert words in said.err and len(said.err.splitlines()) == 1
    assert not (tmp_path / "out.json").exists() and not (tmp_path / "base").exists()


def test_a_checkpoint_that_its_run_prunes_meanwhile_is_scored(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, load, kept = shutil.copytree(runs / "fit", tmp_path / "fit"), api.load, nanofed.evaluate(runs / "fit")

    def load_and_prune(*args: Any, **options: Any) -> api.Loaded:
        loaded = load(*args, **options)
        shutil.rmtree(loaded.path)
        return loaded

    monkeypatch.setattr(api, "load", load_and_prune)
    found = nanofed.evaluate(run)
    assert (found.step, found.tokens, found.bpb) == (kept.step, kept.tokens, kept.bpb)


def test_a_checkpoint_alone_is_scored_and_writes_nowhere(runs: Path, bundle: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone"
    shutil.copytree(find_checkpoint(runs / "fit"), lone)
    before = sorted(tmp_path.rglob("*"))
    found = nanofed.evaluate(lone, bpb=False, core=True, core_data=bundle)
    assert found.core is not None and sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(runs: Path, bundle: Path, tmp_path: Path) -> None:
    alone = nanofed.evaluate(runs / "fit", core=True, core_data=bundle, compute_dtype="float32").to_plain()
    output = tmp_path / "two.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "nanofed",
        "evaluate",
    ]
    options = ["--bpb", "--core", f"--core_data={bundle}", f"--json={output}", "--dtype=float32"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = ended([*command, str(runs / "fit"), *options], env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bits per byte") == 1
    (found,) = json.loads(output.read_text())
    assert found["bpb"] == alone["bpb"]
    assert found["core"]["tasks"] == json.loads(json.dumps(alone["core"]["tasks"]))


# --- while a run trains


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run) / "model.safetensors")


@pytest.mark.parametrize("path", ["fit", "federate"])
def test_core_of_a_run_that_trains_changes_no_bit_of_it(
    path: str, corpus: Corpus, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    every = {"fit": ["--eval_every=2", "--core_every=2"], "federate": ["--eval_every=1", "--core_every=2"]}[path]
    options = [*every, f"--core_data={bundle}", "--core_examples=8", f"--runs_dir={tmp_path}/own"]
    assert cli.main(corpus.start(path, *options)) == 0
    run = tmp_path / "own" / path
    said = capsys.readouterr().out
    assert "CORE will be partial" in said and " (partial), 95 % within " in said
    steps = [step for step, _ in points(run, "core/metric")]
    assert steps == ([0, 2, 4] if path == "fit" else [0, 2])
    assert points(run, "core/metric")[-1][1] == pytest.approx(points(run, "core/metric_by_tokens")[-1][1])
    other, own = weights(runs / path), weights(run)
    assert all(torch.equal(own[name], tensor) for name, tensor in other.items())


def test_a_run_that_goes_on_measures_core_where_it_is_due(corpus: Corpus, bundle: Path, tmp_path: Path) -> None:
    options = ["--core_every=2", f"--core_data={bundle}", "--core_examples=8", f"--runs_dir={tmp_path}"]
    assert cli.main(corpus.start("fit", *options)) == 0
    longer = ["--ckpt_path=last", "--model.recipe.num_steps=6"]
    assert cli.main(corpus.start("fit", *options, *longer)) == 0
    assert [step for step, _ in points(tmp_path / "fit", "core/metric")] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--core_every=3"], 2, "take a multiple of --eval_every (2)"),
        (["--core_every=2"], 3, "nanofed data download --core"),
        (["--core_every=2", "--core_data=BUNDLE", "--core_examples=1"], 3, "too few"),
    ],
)
@pytest.mark.parametrize("path", ["fit", "federate"])
def test_a_bundle_that_cannot_be_used_is_refused_before_anything_is_written(
    options: list[str], code: int, words: str, path: str, corpus: Corpus, bundle: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    given = [option.replace("BUNDLE", str(bundle)) for option in options]
    assert cli.main(corpus.start(path, *given, f"--runs_dir={tmp_path}/own")) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "own" / path).exists()


def test_sites_measure_no_core(
    corpus: Corpus, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--core_every=2", f"--core_data={bundle}", "--federation.evaluation=sites", f"--runs_dir={tmp_path}/own"]
    assert cli.main(corpus.start("federate", *options)) == 2
    assert "CORE is measured where the server measures" in capsys.readouterr().err
