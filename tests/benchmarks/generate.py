"""Tokens a second read and generated, against transformers' own NanoChatForCausalLM.generate on the same weights.

Both sides take turns in one process. A turn is a whole call, greedy and to its last token: the time to the first token is
the prompts', the median of the others' is a decoding step. Weights are random: how fast they are does not depend on them.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nanofed import runtime
from nanofed.generation.engine import Engine
from nanofed.generation.sampling import Sampling
from nanofed.model import GPT, GPTConfig
from tests.benchmarks.machine import describe
from tests.benchmarks.options import options
from tests.benchmarks.report import progress, show, spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Side = Callable[
    [Tensor, int], list[float]
]  # of prompts (B, T) and a number of tokens: when it began, and each token's time


def model_of(depth: int, vocab_size: int, dtype: torch.dtype) -> GPT:
    """Return a model of random weights, none of them zero, so that logits differ."""
    model = GPT(GPTConfig.from_depth(depth, vocab_size=vocab_size), compute_dtype=dtype)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=p.size(1) ** -0.5, generator=generator)
    return model


def ours(model: GPT) -> Side:
    engine = Engine(model)

    def turn(prompts: Tensor, max_tokens: int) -> list[float]:
        stamps = [time.perf_counter()]
        for _ in engine.generate(prompts.tolist(), Sampling(temperature=0), max_tokens=max_tokens):
            stamps.append(time.perf_counter())
        return stamps

    return turn


def theirs(model: GPT) -> Side:
    from tests.parity.test_transformers import reference

    other: Any = reference(model, torch.finfo(torch.float32).eps).to(model.compute_dtype)
    other.generation_config.eos_token_id = None

    def turn(prompts: Tensor, max_tokens: int) -> list[float]:
        stamps: list[float] = []

        class Clock:  # a streamer: it is given the prompts before they are read, then every token
            put = staticmethod(lambda tokens: stamps.append(time.perf_counter()))
            end = staticmethod(lambda: None)

        mask = torch.ones_like(prompts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own deprecations
            other.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens, streamer=Clock())
        return stamps

    return turn


def compare(sides: dict[str, Side], prompts: Tensor, max_tokens: int, repeat: int) -> dict[str, Any]:
    """Return tokens a second of both sides, and their ratios, medians of `repeat` turns after one that is not counted."""
    read: dict[str, list[float]] = {name: [] for name in sides}
    decoded: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeat + 1):
        for name, side in sides.items():
            first, *others = [end - start for start, end in pairwise(side(prompts, max_tokens))]
            assert len(others) == max_tokens - 1
            if turn:
                read[name].append(prompts.numel() / first)
                decoded[name].append(len(prompts) / statistics.median(others))
    figures: dict[str, Any] = {
        name: {"read": spread(read[name], 1), "decoded": spread(decoded[name], 1)} for name in sides
    }
    for what, rates in (("read", read), ("decoded", decoded)):
        figures[f"ratio_{what}"] = round(
            statistics.median(rates["nanofed"]) / statistics.median(rates["transformers"]), 3
        )
    return figures


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    for depth in args.depths:
        for dtype in args.dtypes:
            model = model_of(depth, args.vocab_size, DTYPES[dtype])
            sides = {"nanofed": ours(model), "transformers": theirs(model)}
            for rows in args.batch_sizes:
                progress(f"d{depth}, {dtype}, {rows} rows")
                prompts = torch.randint(args.vocab_size, (rows, args.prompt_tokens), generator=generator)
                figures = compare(sides, prompts, args.max_tokens, args.repeat)
                yield {"depth": depth, "dtype": dtype, "batch_size": rows, **figures}


def main(argv: Sequence[str]) -> int:
    parser = options("generate", __doc__, prompt_tokens=128, max_tokens=64, repeat=5, threads=0, vocab_size=65_536)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    args = parser.parse_args(argv)
    if importlib.util.find_spec("transformers") is None:
        print("bench: transformers is the other side; install it: pip install 'transformers>=4.57'", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads or runtime.cpu_count())
    results = list(measure(args))
    rows = [
        [
            f"d{r['depth']} {r['dtype']}, {r['batch_size']} rows",
            *(r[side][what]["median"] for what in ("read", "decoded") for side in ("nanofed", "transformers")),
            r["ratio_read"],
            r["ratio_decoded"],
        ]
        for r in results
    ]
    header = ["tokens/s", "read", "transformers", "decoded", "transformers", "ratio read", "ratio decoded"]
    show({**describe(torch.device("cpu")), "results": results}, rows, header, as_json=args.json)
    return 0
