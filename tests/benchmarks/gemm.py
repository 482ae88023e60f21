"""The machine's GEMM ceiling: how fast the matmuls of a model run when nothing else does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanofed.model import GPTConfig
from nanofed.training.gemm import ceiling
from tests.benchmarks.machine import describe
from tests.benchmarks.options import options
from tests.benchmarks.report import show

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
