"""`bin/bench speeds`: clients of several speeds in rounds and one by one: bits per byte at equal tokens, and what waiting costs.

All in one process and by a virtual clock, on which a client takes a step in a time of 1 / speed. So a run takes the same course
each time, whatever this machine does beside it. Time is told as a multiple of the least in which these clients can train
so many tokens: the time in which nobody ever waits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanofed.errors import ConfigError
from nanofed.federated.federation import Federation
from nanofed.federated.runtimes.in_process import InProcessGrid
from nanofed.federated.site.client import client_app
from nanofed.federated.site.trainer import LocalTrainer
from nanofed.federated.wire.codec import Arrays
from nanofed.federated.wire.messages import Evaluate, Evaluation, Hello, Instructions, Report
from tests.benchmarks.options import options, training
from tests.benchmarks.report import progress, show

PROPORTIONAL = "in proportion to speed"
# By label: the options of the federation, and whether a client's steps are in proportion to its speed.
VARIANTS: dict[str, tuple[dict[str, str], bool]] = {
    "rounds, all take the same steps": ({}, False),
    f"rounds, steps {PROPORTIONAL}": ({}, True),
    f"rounds, steps {PROPORTIONAL}, weighting tokens": ({"weighting": "tokens"}, True),
    "asynchronous, all take the same steps": ({"asynchronous": "true"}, False),
    f"asynchronous, steps {PROPORTIONAL}": ({"asynchronous": "true"}, True),
}


@dataclass
class Paced(LocalTrainer):
    """The trainer of all clients, each of which takes its own number of steps at most."""

    real: LocalTrainer
    steps: dict[str, int]
    reports: list[Report] = field(default_factory=list)

    def hello(self, client: str) -> Hello:
        return self.real.hello(client)

    def evaluate(self, arrays: Arrays, asked: Evaluate) -> Evaluation:
        return self.real.evaluate(arrays, asked)

    def fit(self, arrays: Arrays, instructions: Instructions) -> tuple[Arrays, Report]:
        own = min(instructions.max_steps, self.steps[instructions.client])
        answer = self.real.fit(arrays, replace(instructions, max_steps=own))
        self.reports.append(answer[1])
        return answer


def run(label: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one variant, and return its bits per byte, tokens and time."""
    more, proportional = VARIANTS[label]
    clients, speeds = len(args.speeds), args.speeds
    whole = clients * args.steps
    own = [max(1, round(whole * speed / sum(speeds))) if proportional else args.steps for speed in speeds]
    batch = args.accumulation * args.device_batch_size * args.sequence_len
    given = training(
        args, batch_tokens=clients * batch, num_steps=args.rounds * args.steps, eval_tokens=args.eval_tokens
    )
    given += [f"--runs_dir={folder}", f"--name={'-'.join(label.split())}", f"--seed_everything={args.seed}"]
    given += ["--eval_every=1000000", "--save_every=0", "--fabric.accelerator=cpu", "--overwrite=true"]
    told = {"clients": clients, "round_steps": max(own), "global_batch_tokens": clients * batch, **more}
    given += [f"--federation.{key}={value}" for key, value in told.items()] + args.set
    federation = Federation.from_args(given)
    config = federation.federation
    federation.open()
    site = Paced(federation.trainer(), dict(zip(config.client_names, own, strict=True)))
    # Messages of steps in proportion to speed take all clients the same time.
    pace = [1.0] * clients if proportional else [float(speed) for speed in speeds]
    app = client_app(lambda context: site)
    grid = InProcessGrid(app, config.client_names, pace if config.asynchronous else None)
    loop, began = federation.loop(grid), time.monotonic()
    try:
        loop.train()
    finally:
        loop.metrics.close()
    by_client = dict(zip(config.client_names, speeds, strict=True))
    tokens, spent = loop.state.clock.tokens, 0.0
    if config.asynchronous:
        spent = max(
            sum(report.steps for report in site.reports if report.client == client) / speed
            for client, speed in by_client.items()
        )
    else:
        rounds: dict[int, float] = {}
        for report in site.reports:
            rounds[report.round] = max(rounds.get(report.round, 0.0), report.steps / by_client[report.client])
        spent = sum(rounds.values())
    least = sum(report.steps for report in site.reports) / sum(speeds)
    return {
        "bits_per_byte": loop.metrics.summary.bpb_end,
        "tokens": tokens,
        "merges": loop.state.clock.round,
        "time": spent / least,
        "seconds": time.monotonic() - began,
    }


def main(argv: Sequence[str]) -> int:
    size = {"depth": 2, "vocab_size": 2048, "sequence_len": 256, "device_batch_size": 4, "accumulation": 1}
    numbers = {**size, "rounds": 40, "eval_tokens": 262_144, "seed": 42}
    parser = options("speeds", __doc__, data=True, **numbers)
    parser.add_argument(
        "--steps", type=int, default=30, help="optimizer steps of a client, on average over the clients"
    )
    parser.add_argument("--speeds", type=float, nargs="+", default=[7.0, 5.0, 3.0, 1.0], help="of each client")
    parser.add_argument("--only", default="", help="only variants whose label it is part of")
    parser.add_argument(
        "--set", action="append", default=[], metavar="--KEY=VALUE", help="further options of all variants"
    )
    parser.add_argument("--folder", type=Path, help="where runs go (default: a temporary folder)")
    args = parser.parse_args(argv)
    chosen = [label for label in VARIANTS if args.only in label]
    if not chosen or min(args.speeds) <= 0:
        raise ConfigError(f"speeds are positive, and --only is part of one of: {'; '.join(VARIANTS)}")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nanofed-speeds-") as temporary:
        folder = (args.folder or Path(temporary)).absolute()
        for label in chosen:
            result[label] = run(label, args, folder)
            found = result[label]
            progress(f"{label}: {found['bits_per_byte']:.4f} in {found['seconds']:.0f} s")
    rows = [
        [label, f"{one['bits_per_byte']:.4f}", one["tokens"], one["merges"], f"{one['time']:.2f}"]
        for label, one in result.items()
    ]
    show(result, rows, ["variant", "bits per byte", "tokens", "merges", "time"], as_json=args.json)
    return 0
