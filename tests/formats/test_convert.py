"""What a path holds is found out by itself; what is made is there whole or not at all."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanofed
from nanofed.api import complete
from nanofed.errors import ConfigError, NanofedError
from nanofed.formats import huggingface
from nanofed.training.checkpoint.atomic import CheckpointError
from nanofed.training.checkpoint.format import read_manifest, read_weights
from tests.cli.conftest import Corpus

TARGETS = ["hf", "nanochat", "torch"]


@pytest.mark.parametrize("to", TARGETS)
def test_every_format_is_evaluated_as_the_run_is(to: Any, fit_run: Path, corpus: Corpus, tmp_path: Path) -> None:
    made = nanofed.export(fit_run, tmp_path / "made", to=to)
    ours, theirs = (nanofed.evaluate(where, str(corpus.data), eval_tokens=256) for where in (fit_run, made))
    assert ours.bpb == theirs.bpb and ours.bpb is not None and ours.bpb > 0
    assert (ours.step is None, theirs.step, theirs.tokens) == (False, None, None) and str(
        theirs.checkpoint
    ) in theirs.text()
    with pytest.raises(ConfigError, match=r"was exported, and does not say .*: name one with --data"):
        nanofed.evaluate(made)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "torch"])
def test_a_run_starts_from_a_model_of_elsewhere(to: Any, fit_run: Path, corpus: Corpus, tmp_path: Path) -> None:
    made = nanofed.export(fit_run, tmp_path / "made", to=to)
    imported = nanofed.import_model(made, "theirs", runs_dir=tmp_path / "runs")
    assert (read_manifest(imported).kind, read_manifest(imported).step) == ("weights", 0)
    card = (nanofed.export(imported, tmp_path / "again") / "README.md").read_text()
    assert "by nanofed" not in card and "| tokens |" not in card and "| optimizer steps |" not in card
    newest = max((fit_run / "checkpoints").iterdir())
    theirs, ours = read_weights(imported), read_weights(newest)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    options = {"runs_dir": tmp_path / "runs", "name": "on", "init_from": imported, "model.recipe.num_steps": 1}
    started = nanofed.fit(corpus.fit, overrides=options)
    card = (nanofed.export(tmp_path / "runs" / "on", tmp_path / "on") / "README.md").read_text()
    assert "| began with | the weights of another run or model |" in card and "by nanofed" in card
    assert started.bpb_start == nanofed.evaluate(fit_run, str(corpus.data), eval_tokens=1024).bpb


@pytest.mark.parametrize("to", TARGETS)
def test_what_is_there_is_not_replaced(to: Any, wild: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        nanofed.export(wild, tmp_path / "there", to=to)
    with pytest.raises(ConfigError, match="is there already"):
        nanofed.import_model(nanofed.export(wild, tmp_path / "new", to=to), "there", runs_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "there"]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("to", TARGETS)
def test_a_disk_that_takes_no_more_leaves_nothing(to: Any, wild: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(NanofedError, match="out could not be written, and nothing is left of it"):
            nanofed.export(wild, tmp_path / "out", to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(
    number: signal.Signals, wild: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, *_: object, **__: object) -> None:
        (folder / "half").touch()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(huggingface, "write", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        nanofed.export(wild, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_nanochat_does_not_take_is_refused(wild: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtypes of their own: leave out dtype bfloat16"):
        nanofed.export(wild, tmp_path / "out", to="nanochat", dtype="bfloat16")


def test_a_damaged_checkpoint_is_not_exported(wild: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(wild, tmp_path / "checkpoints" / wild.name)
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="is not what was saved"):
        nanofed.export(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_path_that_holds_no_model_is_refused(wild: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        nanofed.load(tmp_path)
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        nanofed.import_model(tmp_path / "nowhere", "a", runs_dir=tmp_path)
    with pytest.raises(ConfigError, match="is nanofed's own: a run starts from it with --init_from"):
        nanofed.import_model(wild, "a", runs_dir=tmp_path)
    folder = nanofed.export(wild, tmp_path / "out")
    with pytest.raises(ConfigError, match="is no nanochat checkpoint: --tokenizer and --step are for those"):
        nanofed.import_model(folder, "a", runs_dir=tmp_path, step=1)
    with pytest.raises(ConfigError, match="--push uploads what transformers loads"):
        nanofed.export(wild, tmp_path / "more", to="torch", push="me/model")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_not_finite_are_refused_whoever_wrote_them(wild: Path, tmp_path: Path) -> None:
    folder = nanofed.export(wild, tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN or infinity"):
        nanofed.import_model(folder, "run", runs_dir=tmp_path)


def test_a_name_that_means_nothing_is_refused(wild: Path, tmp_path: Path) -> None:
    calls: dict[str, Callable[[], object]] = {
        "no target 'gguf'": lambda: nanofed.export(wild, tmp_path / "out", to=cast(Any, "gguf")),
        "no dtype 'int8'": lambda: nanofed.export(wild, tmp_path / "out", dtype=cast(Any, "int8")),
        "no dtype 'half'": lambda: nanofed.load(wild, compute_dtype="half"),
        "stop takes a list": lambda: nanofed.generate(wild, "a", stop="the"),
        "prompts takes a list": lambda: complete(wild, "two words"),
        "prompt must be text, not NoneType": lambda: nanofed.generate(wild, cast(Any, None)),
    }
    for said, call in calls.items():
        with pytest.raises(ConfigError, match=said):
            call()
    assert list(tmp_path.iterdir()) == []
