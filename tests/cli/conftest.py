"""What tests of the commands share: a small corpus with its tokenizer, and a run of either path trained on it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tensorboard.summary.writer import event_file_writer

from nanofed import cli
from nanofed.data.writing import write_shards
from nanofed.tokenizer.training import train_tokenizer

SENTENCE = "the quick brown fox jumps over a lazy dog while naïve wizards mix potions"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(3, 63)) + f", number {n}." for n in range(240)]


@dataclass(frozen=True)
class Corpus:
    """A dataset, its tokenizer, and configs of a model of one layer on it."""

    folder: Path
    data: Path
    tokenizer: Path
    fit: Path
    federate: Path

    def start(self, command: str, *options: str) -> list[str]:
        """Return the command line of a command on this corpus: `federate` has a config of its own, the others share fit's."""
        return [command, "--config", str(self.federate if command == "federate" else self.fit), *options]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(TEXTS, folder / "data", num_shards=4, rows_per_group=12)
    train_tokenizer(TEXTS, vocab_size=300).save(folder / "tokenizer")
    rows = {"device_batch_size": 8, "eval_tokens": 1024}
    config = {
        "runs_dir": str(folder / "runs"),
        "eval_every": 2,
        "model": {"depth": 1, "sequence_len": 32, "compile": False, "recipe": {"batch_tokens": 512, "num_steps": 4}},
        "data": {"path": str(folder / "data"), "tokenizer": str(folder / "tokenizer"), **rows},
    }
    fit = {**config, "name": "fit", "trainer": {"accelerator": "cpu", "devices": 1}}
    federation = {"clients": 2, "rounds": 2, "round_steps": 1}
    federate = {**config, "name": "federate", "federation": federation, "fabric": {"accelerator": "cpu"}}
    for name, content in (("fit", fit), ("federate", federate)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return Corpus(folder, folder / "data", folder / "tokenizer", folder / "fit.yaml", folder / "federate.yaml")


@pytest.fixture(scope="session")
def fit_run(corpus: Corpus) -> Path:
    """A run of `nanofed fit`: 4 steps."""
    # A run has two files of events. TensorBoard sorts those of one second as text, by a counter of the process, and this process
    # makes many: 10 would stand before 9.
    event_file_writer._global_uid = event_file_writer.AtomicCounter(1000)
    assert cli.main(corpus.start("fit", f"--runs_dir={corpus.folder}/trained")) == 0
    return corpus.folder / "trained" / "fit"


@pytest.fixture(scope="session")
def federated_run(corpus: Corpus) -> Path:
    """A run of `nanofed federate`: 2 rounds of 2 clients."""
    assert cli.main(corpus.start("federate", f"--runs_dir={corpus.folder}/trained")) == 0
    return corpus.folder / "trained" / "federate"


@pytest.fixture
def runs(fit_run: Path, federated_run: Path, tmp_path: Path) -> Path:
    """A folder with one run of either path, named `fit` and `federate`, of whose files the test may dispose."""
    shutil.copytree(fit_run, tmp_path / "runs" / "fit")
    shutil.copytree(federated_run, tmp_path / "runs" / "federate")
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def _own_log_settings() -> Iterator[None]:
    """Undo what a command does to the log of its process."""
    ours = logging.getLogger("nanofed")
    before = ours.handlers[:], ours.level, ours.propagate
    yield
    ours.handlers[:], ours.level, ours.propagate = before
