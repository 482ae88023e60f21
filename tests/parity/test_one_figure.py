"""Bits per byte of one checkpoint is one number, to the last bit, whoever measures it and however the work is divided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanofed import api
from nanofed.training.checkpoint import find_checkpoint
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
    config = federation(corpus, folder, f"{who}-{clients}-{size}", **options, **more)
    config.options.init_from = str(checkpoint)
    loop, _ = train(config)
    assert not loop.state.events.total()
    return loop.board.summary.curve[0].bpb


def test_one_checkpoint_has_one_figure(
    corpus: Path, checkpoint: Path, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    """At 1, 2 and 4 ranks, in `fit`, `validate` and `evaluate`, by the server of a federation and by 1 to 3 of its sites."""
    sizes = [1, 2, 4, 8][-count(2, 4) :]  # 4 ranks of 4 rows are a batch of 512 tokens
    found = figures(
        str(checkpoint), tmp_path, [16, *sizes], [*arguments(corpus, tmp_path, "x", "contiguous"), *STEPS], 1
    )
    for ranks in (2, 4):
        fitting = [size for size in sizes if size * ranks <= 16]
        found |= by_ranks(ranks, corpus, checkpoint, tmp_path, fitting[-count(1, 4) :])
    for size in (None, *sizes):
        data = str(corpus / "data")
        found[f"evaluate, {size} rows"] = api.evaluate(
            checkpoint, data, eval_tokens=EVAL_TOKENS, device_batch_size=size
        )
    for size in sizes:
        found[f"server, {size} rows"] = by_federation(corpus, checkpoint, tmp_path, "server", 1, size)
        for clients in (1, 2, 3)[-count(2, 3) :]:
            figure = by_federation(corpus, checkpoint, tmp_path, "sites", clients, size)
            found[f"{clients} sites, {size} rows"] = figure
    assert len(set(found.values())) == 1, "\n".join(f"{value!r} {name}" for name, value in found.items())
    assert 0 < next(iter(found.values())) < 8
    print(f"{len(found)} ways, one figure: {next(iter(found.values()))!r}")
