"""The same run on one rank and on two real gloo ranks: the same global batches, the same losses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.test_paths import arguments, corpus

__all__ = ["corpus"]  # the fixture

REPOSITORY = Path(__file__).resolve().parents[2]


def run(ranks: int, corpus: Path, tmp_path: Path) -> list[dict[str, Any]]:
    output = tmp_path / f"ranks{ranks}"
    output.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [
        sys.executable,
        *launcher,
        str(REPOSITORY / "tests" / "parity" / "record_batches.py"),
        str(output),
        *arguments(corpus, tmp_path, f"on{ranks}", "contiguous"),
        "--trainer.accelerator=cpu",
        f"--trainer.devices={ranks}",
        f"--trainer.strategy={'ddp' if ranks > 1 else 'auto'}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(output / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def global_batches(ranks: list[dict[str, Any]]) -> dict[int, list[str]]:
    batches: dict[int, list[str]] = defaultdict(list)
    for rank in ranks:
        for step, row in rank["rows"]:
            batches[step].append(row)
    return {step: sorted(rows) for step, rows in batches.items()}


@pytest.mark.slow
def test_two_gloo_ranks_see_the_global_batches_of_one(corpus: Path, tmp_path: Path) -> None:
    one, two = run(1, corpus, tmp_path), run(2, corpus, tmp_path)
    batches = global_batches(one)
    assert len(batches) == 8 and all(len(rows) == 16 for rows in batches.values())
    assert global_batches(two) == batches
    # The ranks hold the same weights, and those of the single one up to the order of the sums (AdamW's eps of 1e-10 makes
    # steps of nearly empty gradients jump, hence norms and not elements).
    for name, weight in one[0]["weights"].items():
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name]), name
        assert float((two[0]["weights"][name] - weight).norm() / weight.norm()) < 1e-4, name
    assert two[0]["bpb"] == pytest.approx(one[0]["bpb"], abs=1e-5)
