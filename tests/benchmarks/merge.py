"""The server's merge against the speed of memory and against Flower's `aggregate`, and the codecs against a plain copy.

The sides take turns on the same arrays. GB/s (10^9) count what has to be read and written once: a fold of fp32 replies reads
the reply (4 bytes a parameter) and reads and writes the fp64 accumulator (8 + 8); of bf16 updates it reads the update (2) and
reads and writes the fp32 accumulator (4 + 4). Flower gets the clients' weights as fp32 arrays whatever the codec. Where the
down-link sends what changed, `encode changes` is the server's work and `add changes` that of both sides.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.server.strategy.aggregate import aggregate

from nanofed.federated.aggregation import make_aggregator
from nanofed.federated.aggregation.aggregator import PseudoGradient
from nanofed.federated.aggregation.outer import OuterNesterov
from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.wire.blocks import flat
from nanofed.federated.wire.changes import changed
from nanofed.federated.wire.codec import CODECS, Array, Codec, hash_arrays
from tests.benchmarks.machine import describe
from tests.benchmarks.options import options
from tests.benchmarks.report import print_json, progress, spread, table

WIDTH = 1024
COPIES = 3  # a turn: one is short
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
T = TypeVar("T")
Times = dict[str, list[float]]  # part -> seconds, one entry a turn


def model(parameters: int, generator: torch.Generator) -> dict[str, Array]:
    """Return weights of about so many parameters: 16 matrices, of which the first two hold a third, and 17 vectors."""
    rows = max(1, parameters // WIDTH)
    shares = [rows // 6 or 1] * 2 + [rows * 2 // 3 // 14 or 1] * 14
    shapes = [shape for share in shares for shape in ((share, WIDTH), (WIDTH,))]
    return {f"w{n}": torch.randn(shape, generator=generator).numpy() for n, shape in enumerate(shapes)}


class Sides:
    """The same clients' replies, merged by us and by Flower; `down` and `up` are the codecs of the two ways."""

    def __init__(
        self, weights: dict[str, Array], locals_: Sequence[dict[str, Array]], down: Codec, up: Codec, clock: str
    ) -> None:
        self._weights, self._locals, self._down, self._up = weights, locals_, down.whole, up
        self._changes = None if down.whole is down else down
        self._now = CLOCKS[clock]
        self._sent = down.whole.encode(weights)
        self._base = down.whole.decode(self._sent, weights)
        self._packed = [up.pack(local, self._base) for local in locals_]
        self._source = torch.randn(sum(array.size for array in weights.values()))
        self._target = torch.empty_like(self._source)
        self._momentum = OuterNesterov(0.7, 0.6)
        self.times: Times = defaultdict(list)

    def _timed(self, part: str, action: Callable[..., T], *args: Any) -> T:
        start = self._now()
        result = action(*args)
        self.times[part].append(self._now() - start)
        return result

    def turn(self) -> float:
        """Time every part once, and return the largest difference between our new weights and Flower's."""
        weights, down, up = self._weights, self._down, self._up
        for _ in range(COPIES):
            self._timed("copy", self._target.copy_, self._source)
        gradient = self._timed("merge", self._merge)
        new = {name: array.copy() for name, array in weights.items()}
        self._timed("step", OuterNesterov(1.0, 0.0).step, new, gradient)
        theirs = self._timed("flower", aggregate, [(list(local.values()), 1) for local in self._locals])
        difference = float(max(np.abs(a - b).max() for a, b in zip(new.values(), theirs, strict=True)))
        self._timed("step with momentum", self._momentum.step, new, gradient)
        self._timed("norm", SentWeights(weights, self._sent, down, up).update_norms, self._packed[0])
        self._timed("encode", down.encode, weights)
        self._timed("decode", down.decode, self._sent, weights)
        if self._changes is not None:
            held = down.parts(self._sent, weights)
            changes = self._timed("encode changes", self._changes.pack, self._locals[0], held)
            self._timed("add changes", changed, self._sent, changes, self._changes, weights)
        self._timed("pack", up.pack, self._locals[0], self._base)
        self._timed("hash", hash_arrays, self._packed[0])
        return difference

    def _merge(self) -> PseudoGradient:
        merger = make_aggregator("mean", SentWeights(self._weights, self._sent, self._down, self._up), Path())
        for number, arrays in enumerate(self._packed):
            self._timed("fold", merger.fold, str(number), arrays, 1.0)
        return merger.result()


def measure(sides: Sides, turns: int) -> tuple[Times, float]:
    """Return the seconds of every part in turns, after one that warms up, and the largest difference to Flower's weights."""
    sides.turn()
    sides.times.clear()
    worst = max(sides.turn() for _ in range(turns))
    return sides.times, worst


def moved_bytes(parameters: int, down: str, up: str) -> dict[str, float]:
    """Return the bytes that each part has to read and write once; 0 where it only hands arrays on."""
    size = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5}
    summed = 8 if CODECS[up].lossless else 4
    whole = size[CODECS[down].whole.name]
    read = size[up] + (whole if CODECS[up].lossless else 0)  # the reply, and the base that it is compared with
    return {
        "copy": 8 * parameters,
        "fold": (size[up] + 2 * summed) * parameters,
        "norm": read * parameters,
        "step with momentum": (16 + summed) * parameters,  # weights, momentum; the gradient is read
        "encode": 0 if down == "fp32" else 6 * parameters,
        "decode": 0 if down == "fp32" else 6 * parameters,
        "encode changes": (4 + whole + size[down]) * parameters,
        "add changes": (size[down] + 2 * whole) * parameters,
        "pack": 0 if up == "fp32" else 10 * parameters,
        "hash": size[up] * parameters,
    }


def summary(times: Times, moved: dict[str, float], clients: int) -> dict[str, Any]:
    """Return the figures of one codec: of every part its seconds, GB/s and share of the copy in the same turn."""
    turns = len(times["merge"])
    copies = [statistics.median(times["copy"][COPIES * turn : COPIES * (turn + 1)]) for turn in range(turns)]
    speeds = [moved["copy"] / seconds / 1e9 for seconds in copies]
    parts: dict[str, Any] = {}
    for part, seconds in times.items():
        size, each = moved.get(part, 0), len(seconds) // turns
        rates = [size / s / 1e9 for s in seconds] if size else []
        shares = [rate / speeds[n // each] for n, rate in enumerate(rates)]
        parts[part] = {
            "seconds": spread(seconds),
            "gb_per_second": statistics.median(rates) if rates else None,
            "share_of_copy": statistics.median(shares) if shares else None,
        }
    fold = [moved["fold"] / seconds / 1e9 for seconds in times["fold"]]
    with_step = [merge + step for merge, step in zip(times["merge"], times["step"], strict=True)]
    return {
        "gb_per_second": spread(fold),
        "share_of_copy": spread([rate / speeds[n // clients] for n, rate in enumerate(fold)])
        | {"best": round(max(fold) / (moved["copy"] / min(times["copy"]) / 1e9), 4)},
        "ratio_to_flower": spread([f / m for f, m in zip(times["flower"], times["merge"], strict=True)]),
        "ratio_with_step": spread([f / m for f, m in zip(times["flower"], with_step, strict=True)]),
        "parts": parts,
    }


def main(argv: Sequence[str]) -> int:
    parser = options("merge", __doc__, clients=4, threads=1, turns=7)
    add = parser.add_argument
    add("--parameters", type=float, default=100e6)
    both = "of the up-link (and the down-link, but --down)"
    add("--codec", nargs="+", choices=CODECS, default=list(CODECS), help=both)
    add("--down", choices=CODECS, help="codec of the down-link")
    add("--clock", choices=CLOCKS, help="default: CPU time of one thread, wall clock of several")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    clock = args.clock or ("cpu" if args.threads == 1 else "wall")
    generator = torch.Generator().manual_seed(0)
    weights = model(int(args.parameters), generator)
    parameters = sum(array.size for array in weights.values())
    progress(f"{parameters:,} parameters, {args.clients} clients")

    def moved(weight: Array) -> Array:
        noise = torch.randn(weight.size, generator=generator)
        return torch.add(flat(weight), noise, alpha=0.01).numpy().reshape(weight.shape)

    locals_ = [{name: moved(weight) for name, weight in weights.items()} for _ in range(args.clients)]
    results = {}
    for codec in args.codec:
        progress(f"codec {codec}")
        down = args.down or codec
        sides = Sides(weights, locals_, CODECS[down], CODECS[codec], clock)
        times, worst = measure(sides, args.turns)
        results[codec] = summary(times, moved_bytes(parameters, down, codec), args.clients)
        results[codec]["largest_difference"] = worst
    if args.json:
        first = results[args.codec[0]]
        head = {name: first[name]["median"] for name in ("gb_per_second", "share_of_copy", "ratio_to_flower")}
        settings = {"parameters": parameters, "clients": args.clients, "threads": args.threads, "clock": clock}
        print_json({**head, "codecs": results, **settings, **describe(torch.device("cpu"))})
        return 0
    for codec, result in results.items():
        rows = [
            [part, figures["seconds"]["median"], figures["gb_per_second"], figures["share_of_copy"]]
            for part, figures in result["parts"].items()
        ]
        print(table(rows, [codec, f"{clock} s", "GB/s", "of copy"]))
        print(
            f"fold {result['gb_per_second']['median']:.1f} GB/s, {result['share_of_copy']['median']:.2f} of a copy "
            f"(best {result['share_of_copy']['best']:.2f}); merge {result['ratio_to_flower']['median']:.1f} times as fast as "
            f"Flower's aggregate ({result['ratio_with_step']['median']:.1f} with FedAvg's step); "
            f"largest difference {result['largest_difference']:.1e}\n"
        )
    return 0
