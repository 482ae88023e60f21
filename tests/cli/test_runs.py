"""What a command does to the folder of a run that is there already, on both paths."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from nanofed import cli
from nanofed.errors import ConfigError
from nanofed.training.run_options import START
from tests.cli.conftest import Corpus

COMMANDS = ("fit", "federate")


def command(name: str, corpus: Corpus, runs: Path, *options: str) -> list[str]:
    return corpus.start(name, f"--runs_dir={runs}", *options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def summary(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


@pytest.mark.parametrize(
    ("name", "part"), [("fit", "optim.optimizer.MuonAdamW"), ("federate", "federated.server.ledger.Ledger")]
)
def test_a_resume_that_fails_while_it_loads_changes_nothing(
    name: str, part: str, corpus: Corpus, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConfigError("it does not fit")

    monkeypatch.setattr(f"nanofed.{part}.load_state_dict", refuse)
    before = contents(runs)
    longer = ["--ckpt_path=last", "--model.recipe.num_steps=16", "--sample_every=1"]
    assert cli.main(command(name, corpus, runs, *longer)) == 2
    assert contents(runs) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_points_after_the_checkpoint_are_gone_on_resume(name: str, corpus: Corpus, runs: Path) -> None:
    run = runs / name
    newest = sorted((run / "checkpoints").iterdir())[-1]
    at = json.loads((newest / "manifest.json").read_text())
    with SummaryWriter(str(run)) as writer:  # as of a run that was killed after more steps
        for step in range(at["step"] + 1, at["step"] + 60):
            writer.add_scalar("train/loss", 9.0, step)
            writer.add_scalar("train/loss_by_tokens", 9.0, step * 512)
            writer.add_scalar("val/bpb", 9.0, step)
            writer.add_scalar("bpb/by_tokens", 9.0, step * 512)
    content = summary(run)
    lost = {**content["curve"][-1], "step": content["curve"][-1]["step"] + 1}
    (run / "summary.json").write_text(json.dumps({**content, "curve": [*content["curve"], lost]}))
    further = ["--model.recipe.num_steps=8", "--log_every=1" if name == "fit" else "--federation.rounds=4"]
    assert cli.main(command(name, corpus, runs, "--ckpt_path=last", *further)) == 0
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    for tag in ("train/loss_by_tokens", "train/loss", "val/bpb", "bpb/by_tokens"):
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)) and 9.0 not in [event.value for event in events.Scalars(tag)], tag
    assert [point["step"] for point in summary(run)["curve"]] == ([0, 2, 4, 6, 8] if name == "fit" else [0, 2, 4])


@pytest.mark.parametrize("name", COMMANDS)
def test_how_to_start_is_heeded_from_the_command_line_only(
    name: str, corpus: Corpus, runs: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = yaml.safe_load((runs / name / "config.yaml").read_text())
    assert not set(START) & set(saved) and saved["name"] == name
    before = contents(runs / name)
    own = runs / "own.yaml"
    own.write_text(yaml.safe_dump({**saved, "overwrite": True}))
    logging.getLogger("nanofed").propagate = True
    assert cli.main([name, "--config", str(own), f"--runs_dir={runs}"]) == 2
    said = capsys.readouterr()
    assert "already holds a run" in said.err and f"{own}: overwrite is ignored" in said.out
    # An older nanofed has saved them, too.
    (runs / name / "config.yaml").write_text(yaml.safe_dump({**saved, "ckpt_path": "last", "force": True}))
    assert cli.main([name, "--config", str(runs / name / "config.yaml"), f"--runs_dir={runs}"]) == 2
    said = capsys.readouterr()
    assert "already holds a run" in said.err and "ckpt_path is ignored" in said.out and "force is ignored" in said.out
    (runs / name / "config.yaml").write_bytes(before["config.yaml"])
    assert contents(runs / name) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_overwriting_keeps_the_old_run_until_the_new_one_has_done_a_step(
    name: str, corpus: Corpus, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(runs / name)
    over = command(name, corpus, runs, "--overwrite=true")
    with monkeypatch.context() as patch:

        def broken(*args: object, **kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("nanofed.model.gpt.head_loss", broken)
        assert cli.main(over) != 0
    assert contents(runs / name) == before, "the old run is back"
    (runs / name / "thesis.txt").write_text("mine")
    assert cli.main([*over, "--seed_everything=7"]) == 0
    assert yaml.safe_load((runs / name / "config.yaml").read_text())["seed_everything"] == 7
    assert (runs / name / "thesis.txt").read_text() == "mine"
    assert not (runs / f".{name}.replaced").exists()


def test_a_run_that_ends_early_says_why(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limited = command("fit", corpus, tmp_path, "--trainer.max_time=00:00:00:00", "--name=limited")
    assert cli.main(limited) == 0
    assert "ended before its horizon: the time limit trainer.max_time is over" in capsys.readouterr().out
    assert summary(tmp_path / "limited")["ended"].endswith("after 0 of 4 steps")
    assert cli.main(command("federate", corpus, tmp_path, "--federation.rounds=1", "--name=short")) == 0
    assert "ended before its horizon: federation.rounds=1 are done at 1,024 of 2,048 tokens" in capsys.readouterr().out
    assert summary(tmp_path / "short")["ended"].startswith("federation.rounds=1")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_at_its_horizon_says_so(name: str, runs: Path) -> None:
    assert summary(runs / name)["ended"] == "the horizon is reached"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_prompt_that_cannot_be_sampled_is_refused(
    name: str, corpus: Corpus, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(runs)
    prompt = json.dumps(["the quick brown fox " * 200])
    options = ["--overwrite=true", "--sample_every=2", f"--sample_prompts={prompt}"]
    assert cli.main(command(name, corpus, runs, *options)) == 2
    assert "--sample_prompts: 'the quick brown" in capsys.readouterr().err and contents(runs) == before
