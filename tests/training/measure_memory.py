"""Measures what `nanofed.training.memory` estimates: run as a process of its own, prints one JSON object.

python -m tests.training.measure_memory --depth 4 --sequence_len 512 --device_batch_size 8 --vocab_size 4096 --compile true
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from nanofed.data.streams import Batch, DataState
from nanofed.training import lightning_cli  # noqa: F401  what a run imports
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe

MEBI = 2**20


def memory_mib(field: str) -> float:
    """Return a field of this process's memory, such as VmRSS (now) or VmHWM (at most so far)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"depth": 4, "sequence_len": 512, "device_batch_size": 8, "vocab_size": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", choices=["true", "false"], default="false")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = arguments.device_batch_size * arguments.sequence_len
    module = GPTModule(
        arguments.depth,
        arguments.sequence_len,
        arguments.vocab_size,
        Recipe(batch_tokens=tokens * arguments.accumulation, num_steps=arguments.steps),
        arguments.dtype,
        arguments.compile == "true",
    )
    floor = memory_mib("VmRSS")
    module.configure_model()
    optimizer = module.configure_optimizers()
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    result: dict[str, object] = {"floor_mib": floor}
    for step in range(arguments.steps):
        for micro in range(arguments.accumulation):
            draws = torch.randint(arguments.vocab_size, (arguments.device_batch_size, arguments.sequence_len + 1))
            batch = Batch(draws[:, :-1], draws[:, 1:], DataState(0, {}))
            if step == micro == 0:
                with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                    loss = module.training_step(batch)
                result["saved_mib"] = sum(saved.values()) / MEBI
            else:
                loss = module.training_step(batch)
            (loss / arguments.accumulation).backward()
            del loss
        module.pop_losses()
        result["before_step_mib"] = memory_mib("VmHWM")
        optimizer.step()
        optimizer.zero_grad()
    result["peak_mib"] = memory_mib("VmHWM")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
