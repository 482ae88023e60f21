"""Weights, tokenizer and text belong together by what they hold: resume, --init_from and validate, on both paths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nanofed import cli
from nanofed.data.writing import write_shards
from nanofed.tokenizer.training import train_tokenizer
from nanofed.training.checkpoint import format as checkpoint_format
from nanofed.training.checkpoint.folder import MANIFEST
from nanofed.training.checkpoint.format import find_checkpoint
from tests.cli.conftest import TEXTS, Corpus

MORE = {"fit": "--model.recipe.num_steps=6", "federate": "--federation.rounds=3"}


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of as many tokens, of which most mean other text."""
    folder = tmp_path_factory.mktemp("other") / "tokenizer"
    train_tokenizer([text[::-1].upper() for text in TEXTS], vocab_size=300).save(folder)
    return folder


class Started:
    """A run of one path on data of its own, in a folder of its own."""

    def __init__(
        self, command: str, corpus: Corpus, run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.command = command
        self.config = corpus.fit if command == "fit" else corpus.federate
        self.data, self.runs = folder / "data", folder / "runs"
        self.run = self.runs / run.name
        shutil.copytree(corpus.data, self.data)
        shutil.copytree(run, self.run)
        self._capsys = capsys

    def again(self, *options: str, command: str | None = None) -> tuple[int, str, str]:
        """Run a command on the config; return its exit code, output and error."""
        self._capsys.readouterr()
        argv = [command or self.command, f"--config={self.config}", f"--runs_dir={self.runs}"]
        code = cli.main([*argv, f"--data.path={self.data}", *options])
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def resume(self, *options: str) -> tuple[int, str, str]:
        return self.again("--ckpt_path=last", MORE[self.command], *options)

    def replace_text(self, texts: list[str]) -> None:
        shutil.rmtree(self.data)
        write_shards(texts, self.data, num_shards=4, rows_per_group=12)

    def forget_text(self) -> None:
        """Make the checkpoint one of an older nanofed."""
        path = find_checkpoint(self.run) / MANIFEST
        manifest = json.loads(path.read_text())
        del manifest["data"], manifest["checksum"]
        path.write_text(json.dumps({**manifest, "checksum": checkpoint_format._checksum(manifest)}))


@pytest.fixture(params=["fit", "federate"])
def started(
    request: pytest.FixtureRequest, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Started:
    run: Path = request.getfixturevalue("fit_run" if request.param == "fit" else "federated_run")
    return Started(request.param, corpus, run, tmp_path, capsys)


def test_replaced_shards_are_refused_and_can_be_forced(started: Started) -> None:
    started.replace_text(TEXTS[::-1])
    before = sorted((path, path.stat().st_mtime_ns) for path in started.run.rglob("*"))
    code, _, error = started.resume()
    assert code == 2 and "is not the text that" in error and "shard_00000.parquet" in error and "--force true" in error
    assert len(error.splitlines()) == 1
    assert sorted((path, path.stat().st_mtime_ns) for path in started.run.rglob("*")) == before
    code, said, error = started.resume("--force=true")
    assert (code, error) == (0, "") and "forced: " in said and "is not the text that" in said


def test_moved_text_and_other_spellings_go_on(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = started.data.with_name("moved")
    started.data.rename(moved)
    monkeypatch.chdir(moved.parent)
    code, said, error = started.resume("--data.path=./moved")
    assert (code, error) == (0, "") and "differ" not in said and "forced" not in said


def test_fewer_shards_and_another_validation_shard_are_refused(started: Started) -> None:
    code, _, error = started.resume("--data.num_shards=2")
    assert code == 2 and "are there no more" in error
    code, _, error = started.resume("--data.validation_shard=shard_00000.parquet")
    assert code == 2 and "the validation shard holds other text" in error
    code, _, error = started.resume("--data.num_shards=4", "--data.validation_shard=shard_00004.parquet")
    assert (code, error) == (0, "")  # all of them, by another name


def test_a_checkpoint_that_records_no_text_goes_on_and_says_what_is_not_compared(started: Started) -> None:
    started.forget_text()
    code, said, error = started.resume("--force=true")  # the path of the saved config is another one
    assert (code, error) == (0, "") and "does not record its text" in said


@pytest.mark.parametrize("use", ["--init_from", "validate", "resume"])
def test_another_tokenizer_of_the_same_size_is_refused(use: str, started: Started, other_tokenizer: Path) -> None:
    if (use, started.command) == ("validate", "federate"):
        pytest.skip("validate reads fit's config")
    ways: dict[str, Callable[..., tuple[int, str, str]]] = {
        "--init_from": partial(started.again, f"--init_from={started.run}", "--name=new"),
        "validate": partial(started.again, f"--ckpt_path={started.run}", command="validate"),
        "resume": started.resume,
    }
    again = partial(ways[use], f"--data.tokenizer={other_tokenizer}")
    code, _, error = again()
    own = find_checkpoint(started.run) / "tokenizer"
    assert code == 2 and "another tokenizer" in error and f"copy the checkpoint's own, {own}, to a folder" in error
    assert not (started.runs / "new").exists()
    code, said, error = again("--force=true")
    assert code == (0 if use == "--init_from" else 2)
    assert "another tokenizer" in (said if use == "--init_from" else error)


def test_the_tokenizer_in_a_checkpoint_is_its_own(started: Started) -> None:
    own = find_checkpoint(started.run) / "tokenizer"
    code, _, error = started.again(f"--init_from={started.run}", "--name=new", f"--data.tokenizer={own}")
    assert (code, error) == (0, "")
