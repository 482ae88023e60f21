"""Seconds from the start of `nanofed fit` to the end of its first optimizer step, in its parts, with a warm compile cache."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.machine import ROOT, describe
from tests.benchmarks.options import boolean, options, training
from tests.benchmarks.report import progress, show
from tests.benchmarks.train import CLOCKS


def fit_arguments(args: argparse.Namespace, runs: str) -> list[str]:
    """Return the command line of the fit that is measured."""
    tokens = args.sequence_len * args.device_batch_size
    given = training(args, batch_tokens=tokens, num_steps=100, eval_tokens=tokens, compile=args.compile)
    return ["fit", "--name=startup", f"--runs_dir={runs}", *given, "--trainer.devices=1", *args.more]


def run(args: argparse.Namespace, cache: str) -> dict[str, Any]:
    """Start one fit, wait for its first step, and return what the probe in it has counted."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "parts.json"
        environment = dict(os.environ, PYTHONPATH=str(ROOT), TORCHINDUCTOR_CACHE_DIR=cache)
        if args.threads:
            environment["OMP_NUM_THREADS"] = str(args.threads)
        probe = [sys.executable, "-P", "-m", "tests.benchmarks.startup_probe", str(out), str(time.monotonic())]
        done = subprocess.run(
            [*probe, *fit_arguments(args, folder)], env=environment, capture_output=True, text=True, check=False
        )
        if not out.is_file():
            raise RuntimeError(f"the fit ended before its first step:\n{done.stdout}\n{done.stderr}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def main(argv: Sequence[str]) -> int:
    size = {"depth": 4, "sequence_len": 512, "device_batch_size": 8, "vocab_size": 4096}
    parser = options("startup", __doc__, data=True, **size)
    add = parser.add_argument
    add("--compile", type=boolean, default=True)
    add("--threads", type=int, default=0, help="of the CPU; 0 leaves it to torch")
    add("--repeat", type=int, default=3, help="starts with the warm cache, of which the median counts")
    add("more", nargs="*", help="further arguments of nanofed fit, after --")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as cache:
        progress("the first start, which fills the cache")
        cold = run(args, cache)
        warm = []
        for index in range(args.repeat):
            progress(f"warm start {index + 1} of {args.repeat}")
            warm.append(run(args, cache))
    names = list(dict.fromkeys(name for r in (*warm, cold) for name in r["parts"]))
    nothing = {"wall": 0.0, "cpu": 0.0}
    parts = {
        n: {c: round(statistics.median(r["parts"].get(n, nothing)[c] for r in warm), 3) for c in CLOCKS} for n in names
    }
    result = {
        "seconds": round(statistics.median(r["total"] for r in warm), 3),
        "seconds_cold": round(cold["total"], 3),
        "cpu_seconds": round(sum(part["cpu"] for part in parts.values()), 3),
        "imports": parts["imports"],
        "parts": parts,
        "parts_cold": cold["parts"],
        **describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    rows: list[list[object]] = [
        [n, parts[n]["wall"], parts[n]["cpu"], cold["parts"].get(n, nothing)["wall"]] for n in names
    ]
    rows.append(["all", result["seconds"], result["cpu_seconds"], result["seconds_cold"]])
    show(result, rows, ["part", "s", "CPU s", "s with an empty cache"], as_json=args.json)
    return 0
