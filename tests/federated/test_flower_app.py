"""The app that Flower runs, called as Flower calls it: it trains what a `Start` or the settings of a Flower run say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from nanofed.errors import DataError
from nanofed.federated.federation import Federation
from nanofed.federated.outcome import Outcome
from nanofed.federated.runtimes import flower_app
from nanofed.federated.runtimes.in_process import InProcessGrid, run_in_process
from nanofed.training.checkpoint.folder import checkpoints
from tests.federated.tiny import federation


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Flower's home, in which nothing is yet."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("FLWR_HOME", str(home))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(flower_app, "_trainers", {})
    monkeypatch.setattr(flower_app, "_show_log", lambda: None)  # this process's log is not Flower's
    return home


def run(settings: dict[str, Any]) -> None:
    """Run the app with two clients and the settings of a Flower run."""
    grid = InProcessGrid(flower_app.client, ["client-0", "client-1"])
    for context in grid._contexts.values():
        context.run_config.update(settings)
    flower_app.server(grid, Context(1, 0, {}, RecordDict(), settings))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1] / "model.safetensors")


@pytest.fixture
def alone(tiny_corpus: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The weights of the same federation, run in this process."""
    asked = federation(tiny_corpus, tmp_path, "alone", eval_every=1)
    run_in_process(asked)
    return weights(asked.folder)


def opened(corpus: Path, runs: Path, **options: Any) -> Federation:
    """Open a run as `nanofed federate --runtime simulation` does."""
    asked = federation(corpus, runs, "run", eval_every=1, **options)
    asked.config.runtime = "simulation"
    asked.anchor()
    asked.write()
    return asked


def test_a_start_names_the_run_whose_saved_config_is_trained(
    tiny_corpus: Path, tmp_path: Path, home: Path, alone: dict[str, torch.Tensor]
) -> None:
    asked = opened(tiny_corpus, tmp_path)
    asked.start().write(home)
    run({})
    trained = weights(asked.folder)
    assert all(torch.equal(trained[name], alone[name]) for name in alone)


def test_without_a_start_the_settings_say_what_is_trained(
    tiny_corpus: Path, tmp_path: Path, home: Path, alone: dict[str, torch.Tensor]
) -> None:
    config = opened(tiny_corpus, tmp_path).folder / "config.yaml"
    run({"config": str(config), "name": "settings", "runs_dir": str(tmp_path)})
    trained = weights(tmp_path / "settings")
    assert all(torch.equal(trained[name], alone[name]) for name in alone)


def test_an_error_is_written_for_the_command_that_has_started_flower(
    tiny_corpus: Path, tmp_path: Path, home: Path
) -> None:
    absent = tmp_path / "absent"
    opened(tiny_corpus, tmp_path, **{"data.tokenizer": absent}).start().write(home)
    with pytest.raises(DataError):
        run({})
    outcome = Outcome.read(home, 1)
    assert outcome is not None and isinstance(outcome.error(), DataError)
    assert f"there is no folder {absent}" in outcome.reason
