"""The same run on any number of real gloo ranks: the same global batches, the same weights; and a change of ranks half-way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from nanofed.training.checkpoint.folder import checkpoints
from tests.parity.test_paths import STEPS, arguments, corpus

__all__ = ["corpus"]  # the fixture

REPOSITORY = Path(__file__).resolve().parents[2]


STOPPED_AT = 3

Run = list[dict[str, Any]]


def run(ranks: int, corpus: Path, folder: Path, name: str, *more: str) -> Run:
    """Return what every rank has written down of a fit of 8 steps of 16 rows, 4 rows a micro-batch."""
    output = folder / f"{name}-rows"
    output.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [
        sys.executable,
        *launcher,
        str(REPOSITORY / "tests" / "parity" / "record_batches.py"),
        str(output),
        *arguments(corpus, folder, name, "contiguous"),
        "--data.device_batch_size=4",
        f"--save_every={STOPPED_AT}",
        "--keep_checkpoints=0",
        "--trainer.accelerator=cpu",
        f"--trainer.devices={ranks}",
        *more,
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(output / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(corpus: Path, runs: Path) -> Run:
    return run(1, corpus, runs, "one")


@pytest.fixture(scope="module")
def two(corpus: Path, runs: Path) -> Run:
    return run(2, corpus, runs, "two")


def global_batches(ranks: list[dict[str, Any]]) -> dict[int, list[str]]:
    batches: dict[int, list[str]] = defaultdict(list)
    for rank in ranks:
        for step, row in rank["rows"]:
            batches[step].append(row)
    return {step: sorted(rows) for step, rows in batches.items()}


def assert_same_result(ranks: Run, one: Run) -> None:
    """Equal over ranks; and equal to one rank's up to the order of sums.

    AdamW's eps of 1e-10 makes steps of nearly empty gradients jump, hence norms and not elements.
    """
    for name, weight in one[0]["weights"].items():
        for rank in ranks:
            assert torch.equal(rank["weights"][name], ranks[0]["weights"][name]), name
        assert float((ranks[0]["weights"][name] - weight).norm() / weight.norm()) < 1e-4, name
    assert ranks[0]["bpb"][-1] == pytest.approx(one[0]["bpb"][-1], abs=1e-5)


@pytest.mark.slow
def test_two_gloo_ranks_are_one_run(one: Run, two: Run) -> None:
    batches = global_batches(one)
    assert len(batches) == STEPS and all(len(rows) == 16 for rows in batches.values())
    assert global_batches(two) == batches
    assert [rank["strategy"] for rank in two] == ["ShardedStrategy", "ShardedStrategy"]
    assert_same_result(two, one)


@pytest.mark.slow
def test_stock_ddp_by_name_gives_the_same(corpus: Path, runs: Path, one: Run) -> None:
    ddp = run(2, corpus, runs, "ddp", "--trainer.strategy=ddp")
    assert [rank["strategy"] for rank in ddp] == ["DDPStrategy", "DDPStrategy"]
    assert global_batches(ddp) == global_batches(one)
    assert_same_result(ddp, one)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_what_two_ranks_saved_goes_on_at_another_number(
    ranks: int, corpus: Path, runs: Path, one: Run, two: Run
) -> None:
    name = f"from-two-at-{ranks}"
    shutil.copytree(runs / "two", runs / name)
    for path in checkpoints(runs / name)[1:]:  # as if it had been killed between steps 3 and 6
        shutil.rmtree(path)
    resumed = run(ranks, corpus, runs, name, "--ckpt_path=last")
    expected = {step: rows for step, rows in global_batches(one).items() if step >= STOPPED_AT}
    assert global_batches(resumed) == expected  # no row skipped, none twice
    assert_same_result(resumed, one)
