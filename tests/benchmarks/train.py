"""A training step in its phases, against the plain path and against the machine's GEMM ceiling."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from nanofed import runtime
from nanofed.training.laps import PHASES
from tests.benchmarks.corpus import SYNTHETIC, tokenizer_folder
from tests.benchmarks.machine import describe
from tests.benchmarks.options import boolean, options
from tests.benchmarks.report import print_json, progress, quartiles, spread, table
from tests.benchmarks.sides import Setting
from tests.benchmarks.training import Readings
from tests.benchmarks.worker import Worker

CLOCKS = ("wall", "cpu")


def setting_options(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of a `Setting`."""
    size = {"depth": 4, "sequence_len": 512, "device_batch_size": 8, "vocab_size": 4096, "accumulation": 1}
    parser = options(name, description, data=True, **size, threads=1, seed=42)
    add, dtypes = parser.add_argument, ["auto", "float32", "bfloat16"]
    add("--dtype", choices=dtypes, default="auto", help="of nanofed's matmuls")
    add("--reference_dtype", choices=dtypes, default="auto", help="auto: fp32, bf16 on a GPU")
    add("--ns_dtype", choices=dtypes, default="auto", help="of Newton-Schulz on both sides")
    kernels = ["auto", "sdpa", "blocked", "flash"]
    add("--attention", choices=kernels, default="auto", help="of nanofed; flash: without cuDNN's")
    add("--head", choices=["fused", "plain"], default="fused", help="of nanofed; plain holds all logits")
    add("--compile", type=boolean, default=True)
    add("--packing", choices=["contiguous", "best_fit"], default="contiguous")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--clock", choices=["auto", *CLOCKS], default="auto", help="compared; auto: cpu at one thread, else wall")
    return parser


def clock_of(args: argparse.Namespace, setting: Setting) -> str:
    """Return the clock by which sides are compared."""
    alone = torch.device(setting.device).type == "cpu" and setting.threads == 1
    return str(args.clock) if args.clock != "auto" else "cpu" if alone else "wall"


def setting_of(args: argparse.Namespace, **more: Any) -> Setting:
    """Return the setting and prepare what both sides read."""
    names = {field.name for field in dataclasses.fields(Setting)}
    setting = Setting(**{name: value for name, value in vars(args).items() if name in names}, **more)
    if setting.data != SYNTHETIC:
        tokenizer_folder(setting.data, setting.vocab_size)
    return setting


def main(argv: Sequence[str]) -> int:
    parser = setting_options("train", f"{__doc__} --data {SYNTHETIC} is random tokens.")
    add = parser.add_argument
    add("--steps", type=int, default=20, help="measured steps of each side")
    add("--block", type=int, default=2, help="steps of one side before it is the other's turn")
    add("--log_every", type=int, default=10, help="steps between two readings of the loss")
    add("--against", choices=["reference"], help="take turns with the plain path")
    add("--memory", type=boolean, default=True, help="measure peaks, in fresh processes")
    add("--gemm_seconds", type=float, default=0.5, help="for each shape of the ceiling")
    add("--compile_time", action="store_true", help="compile once more into an empty cache, and again from it")
    args = parser.parse_args(argv)
    setting = setting_of(args)
    result = measure(setting, args)
    print_json(result) if args.json else show(result)
    return 0


def measure(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Run the sides in turns and put together what they say."""
    sides = ["ours", *([args.against] if args.against else [])]
    device = torch.device(setting.device)
    clock = clock_of(args, setting)
    before = describe(device)
    readings: dict[str, list[Readings]] = {side: [] for side in sides}
    seconds: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(side, setting)) for side in sides}
        for side, worker in workers.items():
            progress(f"{side}: building and compiling")
            seconds[side] = worker("warm_up")
        ceilings = [workers["ours"]("gemm", setting.dtype, args.gemm_seconds)]
        blocks = -(-args.steps // args.block)
        for index in range(blocks):
            for side, worker in workers.items():
                readings[side] += worker("steps", args.block)
            so_far = ", ".join(summary(side, readings[side], clock) for side in sides)
            progress(f"block {index + 1} of {blocks}: {so_far}")
        ceilings.append(workers["ours"]("gemm", setting.dtype, args.gemm_seconds))
    memory = {}
    for side in sides if args.memory else ():
        with Worker(side, setting) as worker:
            progress(f"{side}: memory")
            memory[side] = worker("memory")
    if args.compile_time:
        for side in sides:
            seconds[side] |= compile_seconds(side, setting)

    figures = {side: side_figures(setting, readings[side], clock) for side in sides}
    ours = figures["ours"]
    best = max(c["best"][clock] for c in ceilings)  # by CPU time both are of one core
    peak = runtime.peak_flops(device)
    reference = figures.get("reference")
    tokens = setting.step_tokens
    flops = setting.config.flops_per_token() * tokens
    causal = flops - attention_above_diagonal(setting)
    return {
        "ratio_forward_backward": reference and round(reference["forward_backward_s"] / ours["forward_backward_s"], 4),
        "ratio_step": reference and round(reference["step_s"] / ours["step_s"], 4),
        "tokens_per_second": round(ours["tokens_per_second"], 1),
        "gemm_share": round(flops / ours["step_s"] / best, 4),
        "mfu": round(flops / ours["step_s"] / peak, 4) if peak else None,
        "peak_memory_mb": round(memory["ours"]["step"], 1) if memory else None,
        "phases": ours["phases_ms"],
        "clock": clock,
        "gemm_share_forward_backward": round(flops / ours["forward_backward_s"] / best, 4),
        "gemm_ceiling_gflops": round(best / 1e9, 2),
        "gemm_gflops": {name: {c: round(r[c] / 1e9, 2) for c in CLOCKS} for name, r in ceilings[-1].items()},
        # What is left to win: the causal half of attention and all other products at the ceiling, and nothing else.
        "ratio_forward_backward_at_ceiling": reference and round(reference["forward_backward_s"] * best / causal, 4),
        "ratios": ratios(readings, figures),
        "memory_mb": memory,
        "peak_memory_ratio": memory_ratios(memory),
        "seconds": seconds,
        "sides": figures,
        "setting": dataclasses.asdict(setting),
        "step_tokens": tokens,
        "flops_per_token": setting.config.flops_per_token(),
        "steps": len(readings["ours"]),
        **before,
        "load_average_after": describe(device)["load_average"],
    }


def attention_above_diagonal(setting: Setting) -> float:
    """Return the FLOPs of a step that `flops_per_token` counts and causal attention need not do."""
    config = setting.config
    return 6.0 * config.n_layer * config.n_embd * (config.sequence_len - 1) * setting.step_tokens


def forward_backward(reading: dict[str, float]) -> float:
    return reading["forward"] + reading["backward"]


def whole(reading: dict[str, float]) -> float:
    return sum(reading.values())


def side_figures(setting: Setting, readings: list[Readings], clock: str) -> dict[str, Any]:
    """Return medians of one side; `step_s` is the median of whole steps, not a sum of medians."""
    step = statistics.median(whole(r[clock]) for r in readings)
    return {
        "step_s": step,
        "forward_backward_s": statistics.median(forward_backward(r[clock]) for r in readings),
        "tokens_per_second": setting.step_tokens / step,
        "phases_ms": {p: round(statistics.median(r[clock][p] for r in readings) * 1e3, 3) for p in PHASES},
        "step_ms": {c: spread([whole(r[c]) * 1e3 for r in readings]) for c in CLOCKS},
        "forward_backward_ms": {c: spread([forward_backward(r[c]) * 1e3 for r in readings]) for c in CLOCKS},
        "host_data_ms": spread([r["host"]["data"] * 1e3 for r in readings]),  # what the Python thread waits for batches
    }


def ratios(readings: dict[str, list[Readings]], figures: dict[str, Any]) -> dict[str, Any] | None:
    """Return reference over ours on each clock: of the medians, and the quartiles of the ratios step by step."""
    if "reference" not in readings:
        return None
    out: dict[str, Any] = {}
    for what, seconds in {"forward_backward": forward_backward, "step": whole}.items():
        for clock in CLOCKS:
            pairs = zip(readings["reference"], readings["ours"], strict=True)
            medians = [figures[side][f"{what}_ms"][clock]["median"] for side in ("reference", "ours")]
            by_step = spread([seconds(r[clock]) / seconds(o[clock]) for r, o in pairs])
            out[f"{what}_{clock}"] = {"of_medians": round(medians[0] / medians[1], 4), "by_step": by_step}
    return out


def memory_ratios(memory: dict[str, dict[str, float]]) -> dict[str, float] | None:
    """Return the peaks of ours over those of the reference."""
    if "reference" not in memory:
        return None
    return {name: round(memory["ours"][name] / memory["reference"][name], 4) for name in ("forward_backward", "step")}


def compile_seconds(side: str, setting: Setting) -> dict[str, float]:
    """Return the first step's seconds with an empty inductor cache, and in another process with what that one cached."""
    out = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first_step_cold", "first_step_warm"):
            with Worker(side, setting, {"TORCHINDUCTOR_CACHE_DIR": cache}) as worker:
                progress(f"{side}: {name.replace('_', ' ')}")
                out[name] = worker("warm_up", 0)["first_step"]
    return out


def summary(side: str, readings: list[Readings], clock: str) -> str:
    return f"{side} {statistics.median(whole(r[clock]) for r in readings) * 1e3:,.1f} ms a step"


def show(result: dict[str, Any]) -> None:
    """Print tables for people."""
    s, hardware = result["setting"], result["hardware"]
    print(
        f"d{s['depth']}, {s['sequence_len']} x {s['device_batch_size']} x {s['accumulation']} tokens a step, vocabulary "
        f"{s['vocab_size']:,}, {s['dtype']}, {s['threads']} thread(s) on {hardware.get('gpu', hardware['cpu'])}; "
        f"medians of {result['steps']} steps by {result['clock']} time\n"
    )
    sides = result["sides"]
    rows: list[list[object]] = [[f"{p} ms", *(f["phases_ms"][p] for f in sides.values())] for p in PHASES]
    for c in CLOCKS:
        rows.append([f"step ms ({c})", *(f["step_ms"][c]["median"] for f in sides.values())])
    rows.append(["tokens/s", *(f["tokens_per_second"] for f in sides.values())])
    for name in ("forward_backward", "step") if result["memory_mb"] else ():
        rows.append([f"peak MB, {name.replace('_', ' ')}", *(m[name] for m in result["memory_mb"].values())])
    for name in ("first_step", "first_step_cold", "first_step_warm"):
        if name in result["seconds"]["ours"]:
            rows.append([f"{name.replace('_', ' ')} s", *(t[name] for t in result["seconds"].values())])
    print(table(rows, ["", *sides]) + "\n")
    shown = ["ratio_forward_backward", "ratio_step", "ratio_forward_backward_at_ceiling"] if len(sides) > 1 else []
    shown += ["gemm_ceiling_gflops", "gemm_share", "gemm_share_forward_backward", "mfu"]
    rows = [[name, result[name]] for name in shown]
    if result["ratios"]:
        for name, r in result["ratios"].items():
            rows.append([f"ratio {name} (quartiles by step)", f"{r['of_medians']:.2f}, {quartiles(r['by_step'], 2)}"])
    if result["peak_memory_ratio"]:
        rows += [[f"peak memory ratio, {name}", ratio] for name, ratio in result["peak_memory_ratio"].items()]
    print(table(rows, ["figure", "value"]))
