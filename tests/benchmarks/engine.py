"""`bin/bench engine`: bits per byte of one model at equal tokens and equal batches, in three ways.

Data parallel in `nanofed fit`; clients in one process; the same clients over a real SuperLink, SuperNodes and trainers. Rounds
have a number of steps, so nothing depends on a clock.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nanofed.errors import ConfigError
from nanofed.federated.deploy.process import ended_by_signals
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.summary import Summary
from tests.benchmarks.machine import ROOT, describe
from tests.benchmarks.options import options, training
from tests.benchmarks.report import print_json, progress, table
from tests.benchmarks.round_fleet import running, tail

STOP_SECONDS = 60.0  # for a side that is told to stop
SIDES = ("fit", "in-process", "deployment")


def command(side: str, args: argparse.Namespace, runs: Path) -> list[str]:
    """Return the arguments of `nanofed` that train one side."""
    tokens = args.clients * args.accumulation * args.device_batch_size * args.sequence_len
    given = training(args, batch_tokens=tokens, num_steps=args.rounds * args.steps, eval_tokens=args.eval_tokens)
    given += [f"--name={side}", f"--runs_dir={runs}", f"--seed_everything={args.seed}", "--keep_checkpoints=1"]
    if side == "fit":
        given += [f"--eval_every={args.steps}", f"--save_every={args.rounds * args.steps}"]
        return ["fit", *given, "--trainer.accelerator=cpu", f"--trainer.devices={args.clients}"]
    rounds = {"clients": args.clients, "quorum": args.clients, "rounds": args.rounds, "round_steps": args.steps}
    given += [f"--federation.{key}={value}" for key, value in (rounds | {"global_batch_tokens": tokens}).items()]
    given += ["--eval_every=1", "--save_every=1", "--fabric.accelerator=cpu"]
    return ["federate", *given, f"--runtime={side}", *args.set]


def run(side: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one side and return its curve, tokens and seconds.

    Raises:
        RuntimeError: it failed; the message ends with its log.
    """
    progress(side)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads)}
    log, started = folder / f"{side}.log", time.monotonic()
    line = [sys.executable, "-P", "-m", "nanofed", *command(side, args, folder)]
    with running(line, log, environment, STOP_SECONDS) as process:
        try:
            code = process.wait(args.seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{side} has taken {args.seconds:.0f} s:{tail(log)}") from None
    if code != 0:
        raise RuntimeError(f"{side} ended with exit code {code}:{tail(log)}")
    wall = time.monotonic() - started
    summary = Summary.read(folder / side)
    return {
        "tokens": summary.tokens,
        "bits_per_byte": summary.bpb_end,
        "training_seconds": summary.seconds,
        "command_seconds": wall,
        "curve": [{"step": p.step, "tokens": p.tokens, "bits_per_byte": p.bpb} for p in summary.curve],
    }


def difference(a: Path, b: Path) -> float:
    """Return the largest difference between two runs' last weights, over the largest weight; 0 for the same bits."""
    ours, theirs = (load_file(checkpoints(run)[-1] / "model.safetensors") for run in (a, b))
    largest = max(float(tensor.abs().max()) for tensor in ours.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours) / largest


def rows(result: dict[str, Any]) -> list[list[object]]:
    """Return the table's rows: a number of tokens, and each side's bits per byte where it was measured."""
    curves = {side: {p["tokens"]: p["bits_per_byte"] for p in result[side]["curve"]} for side in result["sides"]}
    tokens = sorted(set().union(*curves.values()))
    return [
        [f"{number:,}", *(f"{c[number]:.4f}" if number in c else None for c in curves.values())] for number in tokens
    ]


def main(argv: Sequence[str]) -> int:
    size = {"depth": 2, "vocab_size": 2048, "sequence_len": 128, "device_batch_size": 8, "accumulation": 1}
    numbers = {**size, "rounds": 10, "eval_tokens": 65_536, "threads": 1, "seed": 42}
    parser = options("engine", __doc__, data=True, **numbers)
    add = parser.add_argument
    add("--clients", type=int, default=2, help="of the federation, and ranks of the fit")
    add("--steps", type=int, default=20, help="optimizer steps of a round")
    add("--sides", nargs="+", choices=SIDES, default=SIDES)
    add("--set", action="append", default=[], metavar="--KEY=VALUE", help="further options of both federations")
    add("--folder", type=Path, help="where runs and logs go (default: a temporary folder); kept if named")
    add("--seconds", type=float, default=1800.0, help="after which a side is given up")
    args = parser.parse_args(argv)
    if min(args.clients, args.rounds, args.steps) < 1:
        raise ConfigError("--clients, --rounds and --steps must be at least 1")
    with tempfile.TemporaryDirectory(prefix="nanofed-engine-") as temporary, ended_by_signals():
        folder = (args.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {side: run(side, args, folder) for side in args.sides}
        if {"in-process", "deployment"} <= result.keys():
            result["engine_against_process"] = {
                "bits_per_byte": result["deployment"]["bits_per_byte"] - result["in-process"]["bits_per_byte"],
                "weights": difference(folder / "in-process", folder / "deployment"),
            }
    names = [name for name in numbers if name not in ("vocab_size", "eval_tokens")]
    result |= {name: getattr(args, name) for name in (*names, "clients", "steps", "sides")}
    result |= {"data": Path(args.data).name, **describe(torch.device("cpu"))}
    if args.json:
        print_json(result)
        return 0
    lines = rows(result)
    for name in ("training_seconds", "command_seconds"):
        lines.append([name.replace("_", " "), *(result[side][name] for side in args.sides)])
    print(table(lines, ["bits per byte after tokens", *args.sides]))
    if apart := result.get("engine_against_process"):
        same = "the same bits" if apart["weights"] == 0 else f"{apart['weights']:.1e} of the largest apart"
        print(f"\ndeployment against in-process: {apart['bits_per_byte']:+.5f} bits per byte, weights {same}")
    return 0
