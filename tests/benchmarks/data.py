"""`bin/bench data`: from parquet to batches, in CPU seconds and split into reading, encoding, packing and batch.

Everything runs in this thread (`prefetch` 0), so that CPU time is what a core does; both packings take turns in windows.
Reading the CPU clock takes microseconds on some machines, so rates are of windows without it and the split of windows between.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
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
from tests.benchmarks.corpus import default_data, tokenizer_folder
from tests.benchmarks.report import print_json, progress, spread, table

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


class CountingEncoder:
    """A tokenizer that counts the tokens it makes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = 0
        self._tokenizer = tokenizer

    def encode_document(self, text: str) -> Tokens:
        tokens = self._tokenizer.encode_document(text)
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
            for owner, name, phase in (
                (streams, "read_texts", "parquet"),
                (packer, "next_row", "pack"),
                (self._encoder, "encode_document", "encode"),
            ):
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
        return {
            "delivered": delivered,
            "encoded": self._encoder.tokens - encoded,
            "cropped": cropped - before,
            "cpu": cpu,
        }

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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bin/bench data", description=__doc__)
    parser.add_argument("--data", default=default_data(), help="folder of shards, demo or fineweb-edu")
    parser.add_argument(
        "--tokenizer", help="its folder; by default one of --vocab_size is trained on the data and kept"
    )
    parser.add_argument("--vocab_size", type=int, default=65_536)
    parser.add_argument("--sequence_len", type=int, default=2048)
    parser.add_argument("--device_batch_size", type=int, default=32)
    parser.add_argument("--streams", type=int, default=runtime.DEFAULT_STREAMS)
    parser.add_argument("--packing", choices=[*PACKERS, "both"], default="both")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--tokens", type=float, help="tokens delivered by each packing, 10e6 by default")
    length.add_argument("--seconds", type=float, help="CPU seconds of each packing instead")
    parser.add_argument(
        "--warm_up", type=float, default=0, help="tokens delivered before, which fill best fit's buffers"
    )
    parser.add_argument("--json", action="store_true", help="one object on the last line instead of a table")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Measure, and print a table or JSON."""
    options = parse(argv)
    folder = Path(options.tokenizer) if options.tokenizer else tokenizer_folder(options.data, options.vocab_size)
    tokenizer = load_tokenizer(folder)
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
    rows: list[list[Any]] = []
    for label, key in (
        ("tokens delivered / CPU s", "delivered_per_cpu_second"),
        ("tokens encoded / CPU s", "encoded_per_cpu_second"),
        ("tokenizer alone, tokens / CPU s", "tokenizer_alone_per_cpu_second"),
    ):
        rows.append(
            [label, *(f"{p[key]['median']:,.0f} ({p[key]['q1']:,.0f}-{p[key]['q3']:,.0f})" for p in packings.values())]
        )
    for phase in PHASES:
        cells = [
            f"{p['nanoseconds_a_delivered_token'][phase]:,.1f} ({p['share'][phase]:.1%})" for p in packings.values()
        ]
        rows.append([f"{phase}, ns / token delivered", *cells])
    rows.append(["cropped tokens", *(f"{p['cropped_share']:.1%}" for p in packings.values())])
    rows.append(["delivered in all", *(p["delivered_tokens"] for p in packings.values())])
    rows.append(["encoded in all", *(p["encoded_tokens"] for p in packings.values())])
    rows.append(["documents waiting at the end", *(p["waiting_documents"] for p in packings.values())])
    rows.append(["CPU / wall seconds", *(f"{p['cpu_seconds']} / {p['wall_seconds']}" for p in packings.values())])
    print(table(rows, ["median (quartiles) of windows", *packings]))
    print(f"peak memory {result['peak_memory_mb']} MB, {result['peak_memory_over_start_mb']} MB above the start")
