"""Run `nanofed fit` on the ranks that torchrun started, and write down every global batch and the weights at the end."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from nanofed.training.fit import run_fit
from nanofed.training.lightning_cli import FitCLI


class Recorder(Callback):
    """Keeps the hash of every row by optimizer step, and where the row came from."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for row in batch.inputs:
            self.rows.append((trainer.global_step, hashlib.sha256(row.numpy().tobytes()).hexdigest()))


def main(output: Path, args: list[str]) -> None:
    torch.set_num_threads(1)
    cli = FitCLI(args)
    recorder = Recorder()
    cli.trainer.callbacks.append(recorder)  # type: ignore[attr-defined]
    summary = run_fit(cli)
    weights = {name: tensor.clone() for name, tensor in cli.model.gpt.state_dict().items()}
    torch.save(
        {
            "rows": recorder.rows,
            "weights": weights,
            "bpb": [point.bpb for point in summary.curve],
            "strategy": type(cli.trainer.strategy).__name__,
        },
        output / f"rank{cli.trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
