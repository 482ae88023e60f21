"""Count a training step on the fake card: python -m tests.gpu.step --depth 20 --rows 32; prints one JSON object."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from typing import Any

sys.path.append(os.environ["NANOFED_SITE"])
import fakegpu  # type: ignore[import-not-found]  # first: it answers for cuDNN
import torch
import torch.distributed as dist
from torch import nn

from nanofed import runtime
from nanofed.data.streams import Batch, DataState
from nanofed.model import GPT
from nanofed.optim import DistMuonAdamW
from nanofed.training.losses import LossWindow
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe
from nanofed.training.strategy import FabricShardedStrategy


class _Sharded:
    strategy = FabricShardedStrategy()


def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = {"depth": 20, "rows": 32, "accumulation": 1, "sequence_len": 2048, "vocab_size": 65_536, "ranks": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", type=lambda text: text == "True", default=True)
    parser.add_argument("--deterministic", type=lambda text: text == "True", default=False)
    args = parser.parse_args()

    # Nothing is computed: drawing weights would only take time, and touch memory.
    GPT.init_weights = lambda self, seed: None  # type: ignore[method-assign]
    for layer in (nn.Linear, nn.Embedding):
        layer.reset_parameters = lambda self: None  # type: ignore[method-assign]
    if args.deterministic:
        runtime.be_deterministic()
    torch.cuda.set_device(0)
    if args.ranks > 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl", store=store, rank=0, world_size=args.ranks)
    tokens = args.rows * args.sequence_len * args.ranks
    module = GPTModule(
        args.depth,
        args.sequence_len,
        args.vocab_size,
        Recipe(batch_tokens=tokens * args.accumulation, num_steps=1000),
        args.dtype,
        args.compile,
    )
    if args.ranks > 1:
        module._fabric = _Sharded()  # type: ignore[assignment]
    with torch.device("cuda"):
        module.configure_model()
    optimizer = module.configure_optimizers()
    rows = torch.zeros(args.rows, args.sequence_len, dtype=torch.int64).pin_memory()
    window = LossWindow()

    def step() -> dict[str, int]:
        for micro in range(args.accumulation):
            last = micro == args.accumulation - 1
            sharded = isinstance(optimizer, DistMuonAdamW)
            with optimizer.no_sync() if sharded and not last else contextlib.nullcontext():  # type: ignore[attr-defined]
                loss = module.training_step(Batch(rows, rows, DataState(0, {})).to("cuda"))
                (loss / args.accumulation).backward()
                del loss
        before: dict[str, int] = fakegpu.counts()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.grad_norm is not None
        window.add(module.clock.step, module.pop_losses(), optimizer.grad_norm, module.data_state)
        return before

    started = time.time()
    step()
    first = time.time() - started
    step()
    torch.cuda.set_sync_debug_mode("error")
    start = fakegpu.counts()
    middle = step()
    end = fakegpu.counts()
    torch.cuda.set_sync_debug_mode("default")
    result: dict[str, Any] = {
        "micro_batches": {name: middle[name] - start[name] for name in start},
        "update": {name: end[name] - middle[name] for name in end},
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "first_step_s": round(first, 1),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
