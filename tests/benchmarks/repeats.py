"""Bits per byte of runs on what their context has said before and on what is new: who copies, and who predicts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

import nanofed
from nanofed.data.datamodule import TokenDataModule
from nanofed.evaluation.bits_per_byte import BitsPerByte
from tests.benchmarks.options import options
from tests.benchmarks.report import show

KINDS = ("pair", "token", "new")


def kinds(inputs: Tensor, targets: Tensor) -> Tensor:
    """Return what each target (B, T) is to its context, as an index into `KINDS`.

    A "pair" follows a token that it has followed before in its row, so that a model can copy it; a "token" stands
    earlier in the row, behind others; what is neither is "new".
    """
    earlier = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).tril(-1)
    same = (targets[:, :, None] == targets[:, None, :]) & earlier
    pair = (same & (inputs[:, :, None] == inputs[:, None, :])).any(-1)
    token = ((targets[:, :, None] == inputs[:, None, :]) & (earlier | torch.eye(len(earlier), dtype=torch.bool))).any(
        -1
    )
    return torch.where(pair, 0, torch.where(token, 1, 2))


def main(argv: Sequence[str]) -> int:
    parser = options("repeats", __doc__, data=True)
    parser.add_argument("runs", nargs="+", help="run folders, checkpoints or exported models")
    parser.add_argument("--eval_tokens", type=int, default=131_072, help="targets of its validation shard to read")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {}
    for run in args.runs:
        loaded = nanofed.load(run)
        lengths = torch.tensor(loaded.tokenizer.token_bytes)
        metrics = {kind: BitsPerByte(lengths) for kind in ("all", *KINDS)}
        module = TokenDataModule(
            path=args.data, sequence_len=loaded.model.config.sequence_len, eval_tokens=args.eval_tokens
        )
        module.tokenizer = loaded.tokenizer
        with closing(iter(module.validation_loader())) as text, torch.no_grad():
            for batch in text:
                nats = loaded.model(batch.inputs, batch.targets, reduction="none")
                found = kinds(batch.inputs, batch.targets)
                metrics["all"].update(nats, batch.targets)
                for index, kind in enumerate(KINDS):
                    metrics[kind].update(nats, batch.targets.where(found == index, -1))
        total = int(metrics["all"].sum_bytes)
        result[run] = {
            kind: {"bits_per_byte": float(metric.compute()), "bytes": int(metric.sum_bytes) / total}
            for kind, metric in metrics.items()
        }
    rows = [[run, *(f"{found[kind]['bits_per_byte']:.4f}" for kind in found)] for run, found in result.items()]
    shares = next(iter(result.values()))
    show(result, rows, ["run", *(f"{kind} ({shares[kind]['bytes']:.0%})" for kind in shares)], as_json=args.json)
    if not args.json:
        print(
            "\nbits per byte (share of the bytes) of targets that, in their row, follow what they have followed before: a pair;"
        )
        print("that stand in it behind others: a token; and that are new to it")
    return 0
