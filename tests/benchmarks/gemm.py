"""The machine's GEMM ceiling: how fast the matmuls of a model run when nothing else does."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from nanofed.model import GPTConfig
from tests.benchmarks.machine import Laps, describe
from tests.benchmarks.options import options
from tests.benchmarks.report import show

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU_FLOPS, GPU_FLOPS = 2e8, 1e12  # of one try at least: or the clock would be what is measured
MOST_ELEMENTS = 2**28  # of a product: one that is larger is cut


def shapes(config: GPTConfig, tokens: int) -> list[tuple[int, int, int]]:
    """Return (rows, columns, inner) of a model's products: projections, MLP, head, and the weight gradients of the MLP."""
    C, V = config.n_embd, config.vocab_size

    def rows(columns: int) -> int:
        return max(1, min(tokens, MOST_ELEMENTS // columns))

    products = [(rows(columns), columns, inner) for columns, inner in ((C, C), (4 * C, C), (C, 4 * C), (V, C))]
    return list(dict.fromkeys([*products, (4 * C, C, rows(4 * C))]))


def rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, float]:
    """Return FLOP/s of one product on each clock: the best of as many tries as fit into `seconds`, at least three."""
    rows, columns, inner = shape
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(columns, inner, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    flops = 2.0 * rows * columns * inner
    best = {"wall": 0.0, "cpu": 0.0}
    laps = Laps(device)
    torch.mm(a, b.T, out=out)
    repeat = max(1, int((CPU_FLOPS if device.type == "cpu" else GPU_FLOPS) // flops))
    started, tries = time.perf_counter(), 0
    while tries < 3 or time.perf_counter() - started < seconds:
        laps.start()
        for _ in range(repeat):
            torch.mm(a, b.T, out=out)
        laps.lap("forward")
        (read,) = laps.read()
        best = {clock: max(best[clock], repeat * flops / max(read[clock]["forward"], 1e-9)) for clock in best}
        tries += 1
    return best


def ceiling(
    config: GPTConfig, tokens: int, dtype: torch.dtype, device: torch.device, seconds: float = 0.3
) -> dict[str, dict[str, float]]:
    """Return FLOP/s on each clock by shape; `best` is the ceiling."""
    rates = {"x".join(map(str, shape)): rate(shape, dtype, device, seconds) for shape in shapes(config, tokens)}
    rates["best"] = {clock: max(r[clock] for r in rates.values()) for clock in ("wall", "cpu")}
    return rates


def main(argv: Sequence[str]) -> int:
    parser = options("gemm", __doc__, depth=4, sequence_len=512, device_batch_size=8, vocab_size=4096, threads=1)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = GPTConfig.from_depth(args.depth, vocab_size=args.vocab_size, sequence_len=args.sequence_len)
    tokens = args.sequence_len * args.device_batch_size
    rates = {name: ceiling(config, tokens, DTYPES[name], device, args.seconds) for name in args.dtype}
    # CPU time is of all threads together: with more than one the wall clock says how fast the machine is.
    rows = [
        [f"{name} {shape}", r["wall"] / 1e9, r["cpu"] * args.threads / 1e9]
        for name, by_shape in rates.items()
        for shape, r in by_shape.items()
    ]
    result = {"gflops": rates, "threads": args.threads, **describe(device)}
    show(result, rows, ["product", "GFLOP/s", "by CPU time"], as_json=args.json)
    return 0
