"""The optimizer's step on one device: AdamW and Muon as they are, against the separate operations that they replace.

Both sides take turns on the same parameters, gradients and state: every step times each part of one side, then of the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanofed import runtime
from nanofed.model import GPT, GPTConfig
from nanofed.optim import Clock, MuonAdamW, Schedule, parameter_groups
from nanofed.optim.adamw import adamw_update
from nanofed.optim.muon import aspect_scale, equal_stacks, muon_update, orthogonalize
from nanofed.training.laps import synchronize
from tests.benchmarks.machine import describe
from tests.benchmarks.options import options
from tests.benchmarks.report import show, spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOMENTUM = 0.95
STEPS = 5

Part = Callable[[], object]


def separate_adamw(params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], **group: Any) -> None:
    """AdamW in `_foreach` operations, as this project had it first."""
    betas = group["betas"]
    for state in states:
        state["step"] += 1
    first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    torch._foreach_lerp_(first, grads, 1.0 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, grads, grads, 1.0 - betas[1])
    roots = torch._foreach_sqrt(second)
    torch._foreach_div_(roots, [(1.0 - betas[1] ** s["step"]) ** 0.5 for s in states])
    torch._foreach_add_(roots, group["eps"])
    torch._foreach_addcdiv_(params, first, roots, [-group["lr"] / (1.0 - betas[0] ** s["step"]) for s in states])


def separate_muon(
    params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], *, lr: float, dtype: torch.dtype
) -> None:
    """Muon with a lerp and a cast a matrix and Newton–Schulz not compiled, as this project had it first."""
    buffers = [state["momentum_buffer"] for state in states]
    torch._foreach_lerp_(buffers, grads, 1.0 - MOMENTUM)
    for indices in equal_stacks(params):
        stack = torch.stack([grads[i].lerp(buffers[i], MOMENTUM).to(dtype) for i in indices])
        updates = orthogonalize(stack, steps=STEPS, dtype=dtype)
        for i, update in zip(indices, updates, strict=True):
            params[i].add_(update, alpha=-lr * aspect_scale(params[i].shape))


def parts(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Part]]:
    """Return side -> part -> what to time, all on one model with gradients and state."""
    with device:
        model = GPT(config)
        model.init_weights(0)
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    clock = Clock(step_tokens=1, horizon_tokens=1000)
    optimizer = MuonAdamW(parameter_groups(model), schedule=Schedule(), clock=clock, ns_dtype=dtype)
    optimizer.step()  # makes the state, and compiles what is compiled
    compiled = device.type == "cuda"
    groups = [(g, g["params"], [p.grad for p in g["params"]]) for g in optimizer.param_groups]
    states = {id(g): [optimizer.state[p] for p in ps] for g, ps, _ in groups}
    adamw = [(g, ps, gs, states[id(g)]) for g, ps, gs in groups if g["kind"] == "adamw"]
    ((muon_group, matrices, grads),) = [entry for entry in groups if entry[0]["kind"] == "muon"]
    kept = states[id(muon_group)]
    stacks = [torch.stack([grads[i] for i in indices]) for indices in equal_stacks(matrices)]
    lr = 1e-4

    def run_adamw(update: Callable[..., None]) -> None:
        for group, ps, gs, ss in adamw:
            update(ps, gs, ss, lr=lr, betas=group["betas"], eps=group["eps"], weight_decay=0.0)

    def run_newton_schulz(function: Callable[..., Tensor]) -> None:
        for stack in stacks:
            function(stack, steps=STEPS, dtype=dtype)

    def muon() -> None:
        settings: dict[str, Any] = {"lr": lr, "momentum": MOMENTUM, "ns_steps": STEPS, "ns_dtype": dtype}
        muon_update(matrices, grads, kept, compiled=compiled, **settings)

    return {
        "separate": {
            "AdamW": lambda: run_adamw(separate_adamw),
            "Muon": lambda: separate_muon(matrices, grads, kept, lr=lr, dtype=dtype),
            "of it Newton-Schulz": lambda: run_newton_schulz(orthogonalize),
        },
        "nanofed": {
            "AdamW": lambda: run_adamw(adamw_update),
            "Muon": muon,
            "of it Newton-Schulz": lambda: run_newton_schulz(
                torch.compile(orthogonalize) if compiled else orthogonalize
            ),
            "clipping": optimizer._clip_gradients,
        },
    }


@torch.no_grad()
def measure(sides: dict[str, dict[str, Part]], device: torch.device, steps: int) -> dict[str, dict[str, list[float]]]:
    """Return milliseconds by side and part: CPU time on a CPU, which others on the machine hardly touch, else wall time."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times: dict[str, dict[str, list[float]]] = {side: {name: [] for name in todo} for side, todo in sides.items()}
    for step in range(steps + 1):
        for side, todo in sides.items():
            for name, part in todo.items():
                synchronize(device)
                start = clock()
                part()
                synchronize(device)
                if step:  # the first one warms up
                    times[side][name].append(1e3 * (clock() - start))
    return times


def main(argv: Sequence[str]) -> int:
    parser = options("optimizer", __doc__, depth=4, vocab_size=4096, threads=1, steps=10)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of Newton-Schulz")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cpu":
        runtime.keep_freed_memory()  # as a training does
    dtype = DTYPES.get(args.dtype, runtime.default_compute_dtype(device))
    config = GPTConfig.from_depth(args.depth, vocab_size=args.vocab_size, sequence_len=512)
    times = measure(parts(config, device, dtype), device, args.steps)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["separate"][name], times["nanofed"][name], strict=True))
        for name in times["separate"]
    }
    ours = times["nanofed"]
    step = statistics.median(map(sum, zip(ours["AdamW"], ours["Muon"], ours["clipping"], strict=True)))
    result = {
        "milliseconds": {side: {n: spread(values) for n, values in named.items()} for side, named in times.items()},
        "step_milliseconds": step,
        "ratio": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "dtype": str(dtype).removeprefix("torch."),
        "threads": args.threads,
        **describe(device),
    }
    rows: list[list[object]] = []
    for name, values in ours.items():
        old = times["separate"].get(name)
        rows.append([name, statistics.median(old) if old else None, statistics.median(values), ratios.get(name)])
    rows.append(["step", None, step, None])
    show(result, rows, ["ms", "separate", "nanofed", "ratio"], as_json=args.json)
    return 0
