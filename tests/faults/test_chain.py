"""What checks a soak finds a round that is missing, rows that are free again, and rows that nobody has read."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanofed.federated.runtimes.in_process import run_in_process
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.checkpoint.format import read_state
from tests.faults import chain
from tests.faults.chain import check_chain, row_lengths
from tests.federated.tiny import federation, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_in_process(federation(corpus, folder, "run", rounds=8, availability=0.7))  # clients leave and come back
    return folder / "run"


def test_the_rounds_of_a_run_follow_from_each_other(run: Path, corpus: Path) -> None:
    assert check_chain(run, row_lengths(corpus)) == len(checkpoints(run)) > 3


def test_a_round_that_is_missing_is_found(run: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run")[2])
    with pytest.raises(AssertionError, match=r" off$|^.* is [0-9.e-]+ off"):
        check_chain(tmp_path / "run", row_lengths(corpus))


def freed(state: dict[str, Any]) -> None:
    """Give merged rows back."""
    for part in state["ledger"]["rows"]:
        part[2] = [[0, length] for _, length in part[2]]


def unread(state: dict[str, Any]) -> None:
    """Mark free rows as merged."""
    for part in state["ledger"]["rows"]:
        part[2] = [[2 if value == 0 else value, length] for value, length in part[2]]


@pytest.mark.parametrize(
    ("change", "said"), [(freed, "are free again"), (unread, "tokens were merged, the ledger has grown by")]
)
def test_a_ledger_that_does_not_fit_is_found(
    change: Callable[[dict[str, Any]], None], said: str, run: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = checkpoints(run)[-1]

    def changed(path: Path) -> dict[str, Any]:
        state = copy.deepcopy(read_state(path))
        if path == last:
            change(state)
        return state

    monkeypatch.setattr(chain, "read_state", changed)
    with pytest.raises(AssertionError, match=said):
        check_chain(run, row_lengths(corpus))
