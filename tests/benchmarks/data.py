"""`bin/bench data`: from parquet to batches, in CPU seconds and split into reading, encoding, packing and batch.

Everything runs in this thread (`prefetch` 0), so that CPU time is what a core does; both packings take turns in windows.
Reading the CPU clock takes microseconds on some machines, so rates are of windows without it and the split of windows between.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from nanofed import runtime
from nanofed.data import streams
from nanofed.data.packing import PACKERS, Tokens
from nanofed.data.rows import RowPlan
from nanofed.data.shards import open_dataset
from nanofed.tokenizer.bpe import Tokenizer, load_tokenizer
from tests.benchmarks import machine
from tests.benchmarks import options as bench
from tests.benchmarks.report import print_json, progress, quartiles, spread, table

CPU = torch.device("cpu")
PHASES = ("parquet", "encode", "pack", "batch")
WINDOWS = 10  # with the clock in every phase, and as many without


class Split:
    """CPU seconds of this process by phase: the innermost phase is on the clock, `batch` where there is none."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._inside = ["batch"]
        self._mark = time.process_time()

    def count(self) -> None:
        """Put the time since the last call on the clock."""
        now = time.process_time()
        self.seconds[self._inside[-1]] += now - self._mark
        self._mark = now

    def skip(self) -> None:
        """Leave the time since the last call out."""
        self._mark = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.count()
        self._inside.append(name)
        try:
            yield
        finally:
            self.count()
            self._inside.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*args, **options)

        return call


class CountingEncoder(Tokenizer):
    """A tokenizer that counts the tokens it makes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer.vocabulary)
        self.tokens = 0

    def encode_document(self, text: str) -> Tokens:
        tokens = super().encode_document(text)
        self.tokens += len(tokens)
        return tokens


class Side:
    """One packing over the corpus."""

    def __init__(self, plan: RowPlan, tokenizer: Tokenizer, packing: str, options: argparse.Namespace) -> None:
        self.packing = packing
        self.wall = 0.0
        self._plain: list[dict[str, float]] = []
        self._timed: list[dict[str, float]] = []
        self._encoder = CountingEncoder(tokenizer)
        self._loader = streams.TokenLoader(
            plan,
            self._encoder,
            sequence_len=options.sequence_len,
            device_batch_size=options.device_batch_size,
            streams=options.streams,
            packing=packing,
        )
        self._batches = iter(self._loader)
        self._batch_tokens = options.device_batch_size * options.sequence_len
        self._cropped = 0

    def plain(self, tokens: float, seconds: float) -> None:
        """Make batches until so many tokens are delivered or so many CPU seconds used, and keep the window's figures."""
        self._plain.append(self._window(tokens, seconds))

    def timed(self, tokens: float, seconds: float) -> None:
        """The same with every phase on the clock."""
        split = Split()
        packer: Any = PACKERS[self.packing]
        with ExitStack() as stack:
            calls = [(streams, "read_texts", "parquet"), (packer, "next_row", "pack")]
            for owner, name, phase in [*calls, (self._encoder, "encode_document", "encode")]:
                stack.enter_context(patch.object(owner, name, split.timed(phase, getattr(owner, name))))
            window = self._window(tokens, seconds)
            split.count()
        self._timed.append({**window, **split.seconds})

    def _window(self, tokens: float, seconds: float) -> dict[str, float]:
        encoded, delivered = self._encoder.tokens, 0
        started, begin = time.perf_counter(), time.process_time()
        while delivered < tokens and time.process_time() - begin < seconds:
            next(self._batches)
            delivered += self._batch_tokens
        cpu = time.process_time() - begin
        self.wall += time.perf_counter() - started
        cropped, before = sum(packer.cropped_tokens for packer in self._loader.packers.values()), self._cropped
        self._cropped = cropped
        encoded = self._encoder.tokens - encoded
        return {"delivered": delivered, "encoded": encoded, "cropped": cropped - before, "cpu": cpu}

    def result(self, skipped: int) -> dict[str, Any]:
        """Return the figures, without the first `skipped` plain windows, which fill the buffers."""
        plain, timed = self._plain[skipped:], self._timed
        total = {key: sum(window[key] for window in [*plain, *timed]) for key in plain[0]}
        split = {phase: sum(window[phase] for window in timed) for phase in PHASES}
        timed_tokens, timed_cpu = sum(w["delivered"] for w in timed), sum(split.values())
        shares = [w["cropped"] / (w["cropped"] + w["delivered"]) for w in plain]
        return {
            "delivered_per_cpu_second": spread([w["delivered"] / w["cpu"] for w in plain], 0),
            "encoded_per_cpu_second": spread([w["encoded"] / w["cpu"] for w in plain], 0),
            "tokenizer_alone_per_cpu_second": spread([w["encoded"] / w["encode"] for w in timed if w["encoded"]], 0),
            "nanoseconds_a_delivered_token": {p: round(1e9 * split[p] / timed_tokens, 1) for p in PHASES},
            "share": {p: round(split[p] / timed_cpu, 4) for p in PHASES},
            "cropped_share": round(total["cropped"] / (total["delivered"] + total["cropped"]), 4),
            "cropped_share_of_windows": [round(share, 3) for share in shares],
            "delivered_tokens": int(total["delivered"]),
            "cropped_tokens": int(total["cropped"]),
            "encoded_tokens": int(total["encoded"]),
            "waiting_documents": sum(len(at.pending) for at in self._loader.state.streams.values()),
            "cpu_seconds": round(total["cpu"], 2),
            "wall_seconds": round(self.wall, 2),
        }


def main(argv: list[str]) -> int:
    parser = bench.options("data", __doc__, data=True, vocab_size=65_536, sequence_len=2048, device_batch_size=32)
    add = parser.add_argument
    add("--tokenizer", help="its folder; by default one of --vocab_size is trained on the data and kept")
    add("--streams", type=int, default=runtime.DEFAULT_STREAMS)
    add("--packing", choices=[*PACKERS, "both"], default="both")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--tokens", type=float, help="tokens delivered by each packing, 10e6 by default")
    length.add_argument("--seconds", type=float, help="CPU seconds of each packing instead")
    add("--warm_up", type=float, default=0, help="tokens delivered before, which fill best fit's buffers")
    options = parser.parse_args(argv)
    tokenizer = load_tokenizer(bench.tokenizer_of(options))
    dataset = open_dataset(runtime.dataset_dir(options.data))
    plan = RowPlan.whole(dataset)
    seconds = options.seconds or float("inf")
    tokens = (options.tokens or 10e6) if options.seconds is None else float("inf")
    names = list(PACKERS) if options.packing == "both" else [options.packing]
    resident = machine.resident_memory_mb()
    machine.reset_peak_memory(CPU)
    sides = [Side(plan, tokenizer, name, options) for name in names]
    progress(f"{WINDOWS} windows of {' and '.join(names)} in turns")
    for side in sides:
        side.plain(max(1, options.warm_up), float("inf"))
    for _ in range(WINDOWS):
        for side in sides:
            side.plain(tokens / WINDOWS / 2, seconds / WINDOWS / 2)
            side.timed(tokens / WINDOWS / 2, seconds / WINDOWS / 2)
    packings = {side.packing: side.result(1) for side in sides}
    result = {
        "benchmark": "data",
        **machine.describe(CPU),
        "settings": {
            **{k: v for k, v in vars(options).items() if k not in ("json", "tokenizer", "data")},
            "data": dataset.path.name,
            "vocab_size": tokenizer.vocab_size,
            "documents": sum(shard.num_rows for shard in dataset.train),
            "text_mb": round(sum(shard.text_bytes for shard in dataset.train) / 1e6, 1),
            "threads": 1,
        },
        "packings": packings,
        "peak_memory_mb": round(machine.peak_memory_mb(CPU), 1),
        "peak_memory_over_start_mb": round(machine.peak_memory_mb(CPU) - resident, 1),
    }
    if options.json:
        print_json(result)
    else:
        show(result)
    return 0


def show(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    settings, packings = result["settings"], result["packings"]
    print(f"{result['hardware']}  {result['versions']}  commit {result['commit']}  load {result['load_average']}")
    print("  ".join(f"{name} {value}" for name, value in settings.items() if value is not None))
    columns = [column(packing) for packing in packings.values()]
    rows = [[label, *(figures[label] for figures in columns)] for label in columns[0]]
    print(table(rows, ["median (quartiles) of windows", *packings]))
    print(f"peak memory {result['peak_memory_mb']} MB, {result['peak_memory_over_start_mb']} MB above the start")


def column(packing: dict[str, Any]) -> dict[str, object]:
    """Return the figures of one packing by their labels."""
    return {
        "tokens delivered / CPU s": quartiles(packing["delivered_per_cpu_second"]),
        "tokens encoded / CPU s": quartiles(packing["encoded_per_cpu_second"]),
        "tokenizer alone, tokens / CPU s": quartiles(packing["tokenizer_alone_per_cpu_second"]),
        **{
            f"{p}, ns / token delivered": f"{nanoseconds:,.1f} ({packing['share'][p]:.1%})"
            for p, nanoseconds in packing["nanoseconds_a_delivered_token"].items()
        },
        "cropped tokens": f"{packing['cropped_share']:.1%}",
        "delivered in all": packing["delivered_tokens"],
        "encoded in all": packing["encoded_tokens"],
        "documents waiting at the end": packing["waiting_documents"],
        "CPU / wall seconds": f"{packing['cpu_seconds']} / {packing['wall_seconds']}",
    }
