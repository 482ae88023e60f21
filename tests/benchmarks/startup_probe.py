"""`nanofed fit` up to its first optimizer step, with a mark at each part of the way: run by `startup` in a fresh process.

    python -m tests.benchmarks.startup_probe OUT.json START fit --config …

START is the parent's monotonic clock when it started this process.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN = time.monotonic()  # of this module: the interpreter is up

spent: dict[str, list[float]] = {}  # part -> wall and CPU seconds, without those of parts inside it
_stack: list[list[Any]] = []  # [part, wall, cpu] of the parts that are open


def _charge() -> None:
    """Give the time since the last change to the innermost open part."""
    wall, cpu = time.monotonic(), time.process_time()
    if _stack:
        part, since_wall, since_cpu = _stack[-1]
        entry = spent.setdefault(part, [0.0, 0.0])
        entry[0] += wall - since_wall
        entry[1] += cpu - since_cpu
        _stack[-1][1:] = wall, cpu


def enter(part: str) -> None:
    _charge()
    _stack.append([part, time.monotonic(), time.process_time()])


def leave() -> None:
    _charge()
    _stack.pop()
    if _stack:
        _stack[-1][1:] = time.monotonic(), time.process_time()


def counted(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its time counted as a part."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        enter(part)
        try:
            return function(*args, **kwargs)
        finally:
            leave()

    return wrapper


def main() -> None:
    out, start = Path(sys.argv[1]), float(sys.argv[2])
    spent["interpreter"] = [BEGIN - start, time.process_time()]
    enter("imports")
    from nanofed.training import fit, lightning_cli  # noqa: F401  (what api.fit imports, and nothing else)

    leave()
    enter("other")
    import lightning
    import torch

    from nanofed.data.datamodule import TokenDataModule
    from nanofed.optim import MuonAdamW
    from nanofed.training.module import GPTModule

    for name in ("dataset", "tokenizer"):
        found: Any = TokenDataModule.__dict__[name]
        found.func = counted("data and tokenizer", found.func)
    patches: list[tuple[Any, str, str]] = [
        (lightning_cli.FitCLI, "__init__", "config"),
        (GPTModule, "configure_model", "model"),
        (lightning.Trainer, "validate", "first validation"),
        (GPTModule, "training_step", "forward (compiles)"),
        (torch.Tensor, "backward", "backward (compiles)"),
    ]
    for owner, name, part in patches:
        setattr(owner, name, counted(part, getattr(owner, name)))
    step = MuonAdamW.step

    def first_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        enter("optimizer")
        step(self, *args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        while _stack:
            leave()
        parts = {part: {"wall": wall, "cpu": cpu} for part, (wall, cpu) in spent.items()}
        out.write_text(json.dumps({"total": time.monotonic() - start, "parts": parts}))
        sys.stdout.flush()
        os._exit(0)  # what comes after the first step is no part of this

    MuonAdamW.step = first_step  # type: ignore[method-assign]
    from nanofed.cli import main as command

    sys.argv[1:] = sys.argv[3:]
    raise SystemExit(command(sys.argv[1:]))


if __name__ == "__main__":
    main()
