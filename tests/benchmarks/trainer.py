"""Trainer.fit, with all that nanofed hangs onto it, against a bare loop over the same module, optimizer and data.

Both run in one fit: after every block of micro-batches a callback takes as many by hand, before it lets the Trainer go on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer

from nanofed.data.streams import Batch
from nanofed.training.fit import run_fit
from nanofed.training.laps import synchronize
from nanofed.training.lightning_cli import FitCLI
from nanofed.training.module import GPTModule
from tests.benchmarks.machine import describe
from tests.benchmarks.options import boolean, options, training
from tests.benchmarks.report import progress, quartiles, show, spread
from tests.benchmarks.train import CLOCKS

SIZES: dict[str, dict[str, int]] = {
    "nearly_nothing": {"depth": 1, "sequence_len": 32, "device_batch_size": 8, "vocab_size": 300},
    "tiny": {"depth": 2, "sequence_len": 256, "device_batch_size": 16, "vocab_size": 2048},
    "d4": {"depth": 4, "sequence_len": 512, "device_batch_size": 8, "vocab_size": 4096},
}
Seconds = dict[str, float]


def now() -> Seconds:
    return {"wall": time.perf_counter(), "cpu": time.process_time()}


def since(start: Seconds) -> Seconds:
    return {clock: value - start[clock] for clock, value in now().items()}


class Turns(Callback):
    """Times blocks of micro-batches of the Trainer, and takes the same number by hand in between."""

    def __init__(self, batches: Iterator[Batch], block: int, accumulation: int, log_every: int) -> None:
        self._batches = batches
        self._block = block
        self._accumulation = accumulation
        self._log_every = log_every
        self._seen = 0
        self._mark: Seconds | None = None
        self.trainer: list[Seconds] = []
        self.bare: list[Seconds] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seen += 1
        if self._seen % self._block:
            return
        synchronize(pl_module.device)
        if self._mark is not None:  # the first block compiles
            self.trainer.append(since(self._mark))
        start = now()
        self._by_hand(cast(GPTModule, pl_module), trainer.optimizers[0])
        if self._mark is not None:
            self.bare.append(since(start))
        self._mark = now()

    def _by_hand(self, module: GPTModule, optimizer: torch.optim.Optimizer) -> None:
        state, step, tokens = module.data_state, module.clock.step, module.clock.tokens
        losses = []
        for micro in range(self._block):
            batch = next(self._batches).to(module.device)
            loss = module.training_step(batch)
            losses.append(loss.detach())
            (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]
            if (micro + 1) % self._accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
            if len(losses) == self._log_every * self._accumulation:
                float(torch.stack(losses).mean())
                losses.clear()
        synchronize(module.device)
        # The Trainer and its callbacks must not notice.
        module.pop_losses()
        module.data_state, module.clock.step, module.clock.tokens = state, step, tokens


def measure(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the milliseconds a micro-batch of both, and what the Trainer adds."""
    sized = argparse.Namespace(**vars(args), **SIZES[size])
    micro_tokens, accumulation = sized.sequence_len * sized.device_batch_size, int(args.accumulation)
    block = -(-args.block // accumulation) * accumulation
    tokens, steps = micro_tokens * accumulation, block // accumulation * (args.blocks + 1)
    with tempfile.TemporaryDirectory() as runs:
        given = training(sized, batch_tokens=tokens, num_steps=steps, eval_tokens=micro_tokens, compile=args.compile)
        given += [f"--name={size}", f"--runs_dir={runs}", f"--trainer.accelerator={args.accelerator}"]
        given += ["--trainer.devices=1", "--eval_every=1000000", "--save_every=0", f"--log_every={args.log_every}"]
        cli = FitCLI([*given, "--data.prefetch=0"])  # a thread would make the one's batches in the other's time
        turns = Turns(iter(cli.datamodule.loader()), block, accumulation, args.log_every)
        # The last one: all others have had their turn when it counts.
        cli.trainer.callbacks.append(turns)  # type: ignore[attr-defined]
        run_fit(cli)
    assert len(turns.trainer) == len(turns.bare) == args.blocks, "the run was cut short"
    out: dict[str, Any] = {"micro_batches": block * args.blocks}
    for clock in CLOCKS:
        trainer, bare = ([b[clock] / block * 1e3 for b in blocks] for blocks in (turns.trainer, turns.bare))
        added = [t - b for t, b in zip(trainer, bare, strict=True)]
        out[clock] = {
            "trainer_ms": spread(trainer),
            "bare_ms": spread(bare),
            "overhead_ms": spread(added),
            "overhead_percent": round(100 * statistics.median(added) / statistics.median(bare), 3),
        }
    return out


def main(argv: Sequence[str]) -> int:
    parser = options("trainer", __doc__, data=True, accumulation=1, log_every=10, threads=1)
    add = parser.add_argument
    add("--size", nargs="+", choices=SIZES, default=["tiny", "d4"])
    add("--blocks", type=int, default=10, help="blocks of each")
    add("--block", type=int, default=8, help="micro-batches a block")
    add("--compile", type=boolean, default=True)
    add("--accelerator", default="auto")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    sizes = {}
    for size in args.size:
        progress(f"{size}: {args.blocks} blocks of {args.block} micro-batches each")
        sizes[size] = measure(size, args)
    device = torch.device("cuda" if torch.cuda.is_available() and args.accelerator != "cpu" else "cpu")
    rows = []
    for size, figures in sizes.items():
        for clock in CLOCKS:
            f = figures[clock]
            both = [f[which]["median"] for which in ("bare_ms", "trainer_ms")]
            rows.append([f"{size} ({clock})", *both, quartiles(f["overhead_ms"], 2), f["overhead_percent"]])
    result = {"sizes": sizes, "threads": args.threads, "compile": args.compile, **describe(device)}
    header = ["a micro-batch", "bare ms", "Trainer ms", "added ms (quartiles)", "added %"]
    show(result, rows, header, as_json=args.json)
    return 0
