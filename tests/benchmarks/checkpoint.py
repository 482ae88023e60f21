"""Saving and loading a whole training state: seconds, bytes, and peak memory above what the model itself takes."""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nanofed.errors import ConfigError
from nanofed.model import GPT, GPTConfig
from nanofed.optim import Clock, MuonAdamW, Schedule, parameter_groups
from nanofed.tokenizer.bpe import load_tokenizer
from nanofed.training.checkpoint.lightning_io import PREFIX, DirectoryCheckpointIO
from tests.benchmarks import machine
from tests.benchmarks.corpus import tokenizer_folder
from tests.benchmarks.options import options
from tests.benchmarks.report import progress, show

CPU = torch.device("cpu")


def trained(config: GPTConfig) -> tuple[GPT, MuonAdamW]:
    """Return a model and an optimizer with the state that a step leaves behind."""
    model = GPT(config)
    model.init_weights(0)
    clock = Clock(step_tokens=1, horizon_tokens=2)
    optimizer = MuonAdamW(parameter_groups(model), schedule=Schedule(), clock=clock, clip=None)
    for group in optimizer.param_groups:
        if group["kind"] == "muon":
            group["ns_steps"] = 0  # what is saved depends on no iteration, which would take minutes for d20
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def timed(action: Callable[[], Any]) -> dict[str, float]:
    """Return wall and CPU seconds of an action, and the MB of memory that it took at most beyond what there was."""
    machine.reset_peak_memory(CPU)
    before = machine.resident_memory_mb()
    start, cpu = time.perf_counter(), time.process_time()
    result = action()
    seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    peak = machine.peak_memory_mb(CPU)
    del result
    return {**seconds, "peak_mb": peak, "added_mb": max(0.0, peak - before)}


def save(config: GPTConfig, tokenizer: Path, folder: Path, repeat: int) -> dict[str, Any]:
    """Save a few times, in a process of its own; the last one stays."""
    torch.set_num_threads(1)
    model, optimizer = trained(config)
    io = DirectoryCheckpointIO(config, load_tokenizer(tokenizer))
    times = []
    for step in range(1, repeat + 1):
        path = folder / "checkpoints" / f"step_{step:08d}"
        weights = {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
        state = {"state_dict": weights, "optimizer_states": [optimizer.state_dict()], "global_step": step}
        times.append(timed(lambda state=state, path=path: io.save_checkpoint(state, path)))  # type: ignore[misc]
        if step < repeat:
            io.remove_checkpoint(path)
    files = [file for file in path.rglob("*") if file.is_file()]
    return {"save": medians(times), "bytes": sum(f.stat().st_size for f in files), "path": str(path)}


def load(config: GPTConfig, tokenizer: Path, path: str) -> dict[str, Any]:
    """Load it in another process: read and verify, then give it to a model and its optimizer."""
    torch.set_num_threads(1)
    model, optimizer = trained(config)
    io = DirectoryCheckpointIO(config, load_tokenizer(tokenizer))

    def restore() -> None:
        checkpoint = io.load_checkpoint(path)
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in checkpoint["state_dict"].items()}
        model.load_state_dict(weights, strict=True)
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])

    return {"load": timed(restore)}


def medians(times: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure, of memory the most."""
    out = {name: statistics.median(t[name] for t in times) for name in ("wall", "cpu")}
    return out | {name: max(t[name] for t in times) for name in ("peak_mb", "added_mb")}


def in_fresh_process(function: Callable[..., dict[str, Any]], *args: object) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main(argv: Sequence[str]) -> int:
    parser = options("checkpoint", __doc__, data=True, vocab_size=65_536)  # the tokenizer is saved with it
    add = parser.add_argument
    add("--depth", type=int, nargs="+", default=[4, 8], help="d20 takes 9 GB of memory and 6 GB of disk")
    add("--folder", type=Path, help="where to save (default: a temporary folder)")
    add("--repeat", type=int, default=3, help="saves, of which the median counts")
    args = parser.parse_args(argv)
    tokenizer = tokenizer_folder(args.data, args.vocab_size)
    results: dict[str, Any] = {}
    for depth in args.depth:
        config = GPTConfig.from_depth(depth, vocab_size=args.vocab_size)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            needed = 3.5 * 4 * config.num_parameters  # weights, one or two moments, and room
            if shutil.disk_usage(folder).free < needed:
                raise ConfigError(f"d{depth} needs {needed / 1e9:.0f} GB free in {folder}: name another --folder")
            progress(f"d{depth}: {config.num_parameters:,} parameters")
            saved = in_fresh_process(save, config, tokenizer, Path(folder), args.repeat)
            loaded = in_fresh_process(load, config, tokenizer, saved.pop("path"))
        results[f"d{depth}"] = {"parameters": config.num_parameters, **saved, **loaded}
    rows = [
        [size, r["parameters"] / 1e6, r["bytes"] / 1e6]
        + [r[what][name] for what in ("save", "load") for name in ("wall", "cpu", "added_mb")]
        for size, r in results.items()
    ]
    header = ["", "M params", "MB on disk", "save s", "CPU s", "added MB", "load s", "CPU s", "added MB"]
    show({"sizes": results, **machine.describe(CPU)}, rows, header, as_json=args.json)
    return 0
