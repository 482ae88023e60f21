"""Bits per byte of one checkpoint is one number, to the last bit, whoever measures it and however the work is divided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanofed import api
from nanofed.training.checkpoint.format import find_checkpoint
from tests.federated.tiny import federation, train
from tests.parity.score import figures
from tests.parity.test_paths import arguments, corpus, one_thread

__all__ = ["corpus", "one_thread"]  # the fixtures

REPOSITORY = Path(__file__).resolve().parents[2]
EVAL_TOKENS = (
    1000  # 31 rows of 32 tokens and one of 8: more than the shard's streams would have given whole batches for
)
STEPS = ["--model.recipe.num_steps=1", "--save_every=0", f"--data.eval_tokens={EVAL_TOKENS}"]


@pytest.fixture(scope="module")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has learned something: at the first weights every token costs the same."""
    runs = tmp_path_factory.mktemp("trained")
    api.fit(args=[*arguments(corpus, runs, "run", "contiguous"), "--trainer.accelerator=cpu"])
    return find_checkpoint(runs / "run")


def by_ranks(ranks: int, corpus: Path, checkpoint: Path, folder: Path, sizes: list[int]) -> dict[str, float]:
    """Return the figures of `fit` and `validate` under torchrun."""
    output = folder / f"{ranks}.json"
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    script = [str(REPOSITORY / "tests" / "parity" / "score.py"), str(output), str(checkpoint), str(folder)]
    options = [*arguments(corpus, folder, "unused", "contiguous"), *STEPS]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, *script, ",".join(map(str, sizes)), *options],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return dict(json.loads(output.read_text()))


def by_federation(corpus: Path, checkpoint: Path, folder: Path, who: str, clients: int, size: int) -> float:
    """Return the figure before the first round of a federation that starts from the checkpoint."""
    options = {"clients": clients, "evaluation": who, "rounds": 1, "eval_every": 1, "round_steps": 1}
    more = {"model.depth": 2, "data.device_batch_size": size, "data.eval_tokens": EVAL_TOKENS}
    loop, _ = train(federation(corpus, folder, f"{who}-{clients}-{size}", **options, **more, init_from=checkpoint))
    assert not loop.state.events.total()
    return loop.metrics.summary.curve[0].bpb


@pytest.fixture(scope="module")
def figure(corpus: Path, checkpoint: Path) -> float:
    """That of `validate` on one rank."""
    options = [*arguments(corpus, checkpoint, "unused", "contiguous"), *STEPS, "--trainer.accelerator=cpu"]
    return api.validate(args=[*options, f"--ckpt_path={checkpoint}"])


Count = Callable[[int, int], int]
SIZES = (8, 4, 2, 1)  # rows a micro-batch


def test_fit_and_validate_at_any_micro_batch(
    corpus: Path, checkpoint: Path, figure: float, tmp_path: Path, count: Count
) -> None:
    options = [*arguments(corpus, tmp_path, "unused", "contiguous"), *STEPS]
    found = figures(str(checkpoint), tmp_path, list(SIZES[: count(1, 4)]), options, 1)
    assert len(found) == count(2, 8) and set(found.values()) == {figure} and 0 < figure < 8


@pytest.mark.parametrize("ranks", [2, 4])
def test_fit_and_validate_on_ranks(
    ranks: int, corpus: Path, checkpoint: Path, figure: float, tmp_path: Path, count: Count
) -> None:
    if ranks > count(2, 4):
        pytest.skip("four ranks: --campaign")
    sizes = [size for size in SIZES if size * ranks <= 16][: count(1, 4)]  # of the 16 rows of a step
    found = by_ranks(ranks, corpus, checkpoint, tmp_path, sizes)
    assert len(found) == 2 * len(sizes) and set(found.values()) == {figure}, found


def test_evaluate(corpus: Path, checkpoint: Path, figure: float) -> None:
    for data in (str(corpus / "data"), None):
        options: dict[str, Any] = {"eval_tokens": EVAL_TOKENS}
        found = api.evaluate(checkpoint, data, **options, compute_dtype=torch.float32)  # the run's own
        assert found.bpb == figure


def test_a_federations_server_and_its_sites(
    corpus: Path, checkpoint: Path, figure: float, tmp_path: Path, count: Count
) -> None:
    for size in SIZES[: count(1, 4)]:
        assert by_federation(corpus, checkpoint, tmp_path, "server", 1, size) == figure
        for clients in (3, 2, 1)[: count(1, 3)]:
            assert by_federation(corpus, checkpoint, tmp_path, "sites", clients, size) == figure
