"""Seconds to a given bits per byte: both sides train on the same batches and are scored on the same text at the same steps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from tests.benchmarks.machine import describe
from tests.benchmarks.report import print_json, progress, table
from tests.benchmarks.train import CLOCKS, clock_of, setting_of, setting_options
from tests.benchmarks.worker import Worker

SIDES = ("ours", "reference")
Point = dict[str, float]  # steps, bits_per_byte, and seconds by clock


def main(argv: Sequence[str]) -> int:
    parser = setting_options("time_to_bpb", __doc__)
    add = parser.add_argument
    add("--steps", type=int, default=60, help="optimizer steps of each side")
    add("--every", type=int, default=10, help="steps between two scores; the sides take turns at each")
    add("--eval_batches", type=int, default=4, help="validation batches of device_batch_size rows")
    add("--bits_per_byte", type=float, help="the figure to reach (default: the worse one of what both end with)")
    args = parser.parse_args(argv)
    setting = setting_of(args, horizon_steps=args.steps)
    clock = clock_of(args, setting)

    curves: dict[str, list[Point]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(side, setting)) for side in SIDES}
        for side, worker in workers.items():
            progress(f"{side}: compiling, then back to the first weights")
            worker("warm_up")
            worker("restart")
            start = worker("bits_per_byte", args.eval_batches)
            curves[side].append({"steps": 0, "bits_per_byte": start, "wall": 0, "cpu": 0})
        while curves["ours"][-1]["steps"] < args.steps:
            for side, worker in workers.items():
                before = curves[side][-1]
                count = min(args.every, args.steps - int(before["steps"]))
                readings = worker("steps", count)
                seconds = {c: before[c] + sum(sum(r[c].values()) for r in readings) for c in CLOCKS}
                bpb = worker("bits_per_byte", args.eval_batches)
                curves[side].append({"steps": before["steps"] + count, "bits_per_byte": bpb, **seconds})
            last = {side: curve[-1] for side, curve in curves.items()}
            progress(
                f"step {last['ours']['steps']:.0f}: "
                + ", ".join(f"{s} {p['bits_per_byte']:.4f} in {p[clock]:.1f} s" for s, p in last.items())
            )

    goal = args.bits_per_byte or max(curve[-1]["bits_per_byte"] for curve in curves.values())
    reached = {side: {c: seconds_to(goal, curve, c) for c in CLOCKS} for side, curve in curves.items()}
    result: dict[str, Any] = {
        "ratio_seconds": ratio(reached, clock),
        "bits_per_byte": goal,
        "seconds": reached,
        "clock": clock,
        "ratios": {c: ratio(reached, c) for c in CLOCKS},
        "largest_difference": max(
            abs(a["bits_per_byte"] - b["bits_per_byte"]) for a, b in zip(*curves.values(), strict=True)
        ),
        "curves": curves,
        "setting": dataclasses.asdict(setting),
        **describe(torch.device(setting.device)),
    }
    if args.json:
        print_json(result)
        return 0
    rows = [
        [f"{p['steps']:.0f}", p["bits_per_byte"], q["bits_per_byte"], p[clock], q[clock]]
        for p, q in zip(*curves.values(), strict=True)
    ]
    rows = [[a, f"{b:.4f}", f"{c:.4f}", f"{d:.1f}", f"{e:.1f}"] for a, b, c, d, e in rows]
    print(table(rows, ["step", "bpb ours", "bpb reference", f"{clock} s ours", f"{clock} s reference"]))
    share = result["ratio_seconds"]
    if share is None:
        print(f"\n{goal:.4f} bits per byte is not reached by both sides: more --steps")
        return 1
    print(f"\n{goal:.4f} bits per byte in {share:.3f} of the reference's seconds ({clock} clock, without compiling)")
    return 0


def seconds_to(goal: float, curve: Sequence[Point], clock: str) -> float | None:
    """Return the seconds until a curve first reaches `goal`, linear between two scores; None where it never does."""
    for before, after in itertools.pairwise(curve):
        if after["bits_per_byte"] <= goal:
            drop = before["bits_per_byte"] - after["bits_per_byte"]
            share = 1.0 if drop <= 0 else min(1.0, max(0.0, (before["bits_per_byte"] - goal) / drop))
            return before[clock] + share * (after[clock] - before[clock])
    return None


def ratio(reached: dict[str, dict[str, float | None]], clock: str) -> float | None:
    """Return our seconds over the reference's."""
    ours, reference = (reached[side][clock] for side in SIDES)
    return None if ours is None or not reference else round(ours / reference, 4)
