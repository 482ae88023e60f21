"""The machine's GEMM ceiling: how fast the matmuls of a model run when nothing else does."""

from __future__ import annotations

import time

import torch

from nanofed.model import GPTConfig
from nanofed.training.laps import Laps

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
    """Return the FLOP/s of every product of the model, by its shape and by clock; `best` is the fastest of them, the ceiling."""
    rates = {"x".join(map(str, shape)): rate(shape, dtype, device, seconds) for shape in shapes(config, tokens)}
    rates["best"] = {clock: max(r[clock] for r in rates.values()) for clock in ("wall", "cpu")}
    return rates
