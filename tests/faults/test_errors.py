"""A run that fails is saved as of its last full step, one whose loss is NaN says where, and a save that fails is told."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from nanofed import api
from nanofed.errors import NanofedError
from nanofed.optim import MuonAdamW
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.checkpoint.format import read_manifest
from nanofed.training.checkpoint.lightning_io import DirectoryCheckpointIO
from nanofed.training.fit import run_fit
from nanofed.training.lightning_cli import FitCLI
from nanofed.training.losses import NonFiniteError
from tests.faults.fits import Cut, arguments, fit
from tests.faults.test_signals import cut, cuts, whole
from tests.parity.test_paths import corpus, one_thread

__all__ = ["corpus", "cut", "cuts", "one_thread", "whole"]  # the fixtures

TWO_RANKS = pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])


def steps(run: Path) -> list[int]:
    return [read_manifest(path).step for path in checkpoints(run)]


# --- exceptions


@TWO_RANKS
def test_an_error_in_the_middle_of_an_accumulation_loses_that_step_only(cuts: Callable[..., Cut], ranks: int) -> None:
    cut = cuts(ranks=ranks)
    said = cut.stop(1, at="micro", number=8, error=True)
    assert steps(cut.run) == [3], "micro-batches 1 to 6; 7 was half a step"
    good = checkpoints(cut.run)[-1]
    assert "the probe's error" in said
    assert f"OSError after step 3: the last good checkpoint is {good}: go on from it with --ckpt_path last" in said
    cut.goes_on()


@pytest.mark.slow
def test_a_rank_that_fails_alone_cannot_save_and_says_what_there_is(cuts: Callable[..., Cut]) -> None:
    cut = cuts(ranks=2, save_every=2)
    said = cut.stop(1, at="micro", number=12, rank=1, error=True)
    assert steps(cut.run) == [2, 4]
    assert f"OSError after step 5: the last good checkpoint is {checkpoints(cut.run)[-1]}" in said
    cut.goes_on()


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_an_error_around_the_update_is_saved_unless_weights_may_have_moved(
    cut: Cut, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    original = MuonAdamW.step

    def step(self: MuonAdamW, closure: Callable[[], float]) -> Any:
        if self.clock.step < 4 or when == "before":
            if self.clock.step == 4:
                raise RuntimeError("broken")  # before the closure: forward has not begun
            return original(self, closure)
        if when == "after":
            original(self, closure)
        else:
            closure()
            self.param_groups[0]["params"][0].data.add_(1.0)
        raise RuntimeError("broken")

    monkeypatch.setattr(MuonAdamW, "step", step)
    with pytest.raises(RuntimeError, match="broken"):
        api.fit(args=cut.args)
    monkeypatch.undo()
    assert steps(cut.run) == {"before": [4], "within": [], "after": [5]}[when]
    cut.goes_on()


# --- NaN


@TWO_RANKS
def test_nan_stops_the_run_with_step_rows_and_the_last_good_checkpoint(cuts: Callable[..., Cut], ranks: int) -> None:
    cut = cuts(ranks=ranks, save_every=3, log_every=5)
    said = cut.stop(1, at="micro", number=7, nan=True, rank=ranks - 1)
    assert steps(cut.run) == [3], "step 4 is not finite, which shows at the reading after step 5"
    good = checkpoints(cut.run)[-1]
    pattern = (
        r"nanofed fit: the training gradient norm is nan at step 4 \(its batch: rows? \d+ .{1,80}\.parquet.{0,20}\); "
        + re.escape(f"the last good checkpoint is {good}: go on from it with --ckpt_path last")
    )
    assert len(re.findall(pattern, said)) == 1, said
    cut.goes_on()


@pytest.mark.parametrize("save_every", [0, 2])
def test_weights_that_are_not_finite_are_never_saved(corpus: Path, tmp_path: Path, save_every: int) -> None:
    class Ruin(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            if trainer.global_step == 3:
                next(pl_module.parameters()).data[0, 0] = torch.inf

    cli = FitCLI(arguments(corpus, tmp_path, "ruined", save_every=save_every, log_every=100, eval_every=100))
    cli.trainer.callbacks.insert(0, Ruin())  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteError, match=r"after step \d+|at step \d+"):
        run_fit(cli)
    assert steps(tmp_path / "ruined") == ([2] if save_every else [])


# --- saves


class Disk:
    """The checkpoint writer, which fails at chosen saves and is slow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...] = (), seconds: float = 0.0) -> None:
        self.saves = 0
        write = DirectoryCheckpointIO.save_checkpoint

        def save(io: DirectoryCheckpointIO, *args: Any, **options: Any) -> None:
            self.saves += 1
            time.sleep(seconds)
            if self.saves in failing:
                raise OSError(28, "No space left on device")
            write(io, *args, **options)

        monkeypatch.setattr(DirectoryCheckpointIO, "save_checkpoint", save)


def test_a_save_that_fails_is_told_and_the_run_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(monkeypatch, failing=(2,))
    with caplog.at_level("WARNING", "nanofed"):
        api.fit(args=arguments(corpus, tmp_path, "full", save_every=4, keep_checkpoints=0))
    assert disk.saves == 3 and steps(tmp_path / "full") == [4, 12]
    first = checkpoints(tmp_path / "full")[0]
    assert [record.message for record in caplog.records if "saved" in record.message] == [
        "step 8 could not be saved: [Errno 28] No space left on device; the run goes on, and the last good checkpoint is "
        f"{first}: go on from it with --ckpt_path last"
    ]


def test_the_last_save_that_fails_ends_the_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, failing=(3, 4, 5))
    with pytest.raises(NanofedError, match=r"not be saved at step 12: .*No space.*the last good checkpoint is .*8"):
        api.fit(args=arguments(corpus, tmp_path, "full", save_every=4))
    assert disk.saves == 3 and steps(tmp_path / "full") == [4, 8]


class FileForFolder(Callback):
    """Puts a file in the place of the folder of checkpoints once training has begun."""

    def __init__(self, run: str) -> None:
        self.run = Path(run)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and batch_idx == 0:
            (self.run / "checkpoints").write_text("a file in the place of a folder")


@pytest.mark.slow
def test_two_ranks_agree_on_a_save_that_fails(corpus: Path, tmp_path: Path) -> None:
    obstacle = {"class_path": f"{__name__}.{FileForFolder.__name__}", "init_args": {"run": str(tmp_path / "full")}}
    options = {"save_every": 4, "trainer.callbacks": json.dumps([obstacle])}
    said = fit(arguments(corpus, tmp_path, "full", ranks=2, **options), tmp_path, ranks=2, code=1)
    assert said.count("step 4 could not be saved") == said.count("step 8 could not be saved") == 1
    assert "nanofed fit: the run could not be saved at step 12" in said


def test_every_nth_is_kept(corpus: Path, tmp_path: Path) -> None:
    api.fit(args=arguments(corpus, tmp_path, "kept", save_every=1, keep_checkpoints=2, keep_every=5))
    assert steps(tmp_path / "kept") == [5, 10, 11, 12]


def test_saves_are_no_training_time(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, seconds=0.5)
    begin = time.monotonic()
    summary = api.fit(args=arguments(corpus, tmp_path, "slow", save_every=2, eval_every=100))
    assert disk.saves == 6
    assert 0 < summary.seconds < time.monotonic() - begin - 6 * 0.5
