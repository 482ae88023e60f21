"""`bin/bench tokenizer`: tokens a CPU second, ours (tiktoken) and Hugging Face's from the same merges, and the training."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nanofed import runtime
from nanofed.data.shards import open_dataset
from nanofed.tokenizer.bpe import Tokenizer, load_tokenizer
from nanofed.tokenizer.training import train_tokenizer
from tests.benchmarks import machine
from tests.benchmarks import options as bench
from tests.benchmarks.corpus import texts
from tests.benchmarks.report import cell, print_json, progress, quartiles, spread, table

CPU = torch.device("cpu")


def hugging_face(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer that Hugging Face's library reads from our `tokenizer.json`."""
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        twin = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    twin.encode_special_tokens = True  # as ours does it: their texts are ordinary text
    return twin


def ways(tokenizer: Tokenizer) -> dict[str, Callable[[str], Sequence[int]]]:
    """Return what is compared: name -> text to ids."""
    twin = hugging_face(tokenizer)
    return {
        "tiktoken, array (training)": lambda text: tokenizer.encode_document(text)[1:],
        "tiktoken, list": tokenizer.encode,
        "Hugging Face tokenizers": lambda text: twin.encode(text, add_special_tokens=False).ids,
    }


def measure_encoding(tokenizer: Tokenizer, documents: Sequence[str], repeats: int) -> dict[str, Any]:
    """Encode the documents one by one in turns; refuses ids that differ.

    Raises:
        ValueError: two ways make other ids of a document.
    """
    compared = ways(tokenizer)
    rates: dict[str, list[float]] = {name: [] for name in compared}
    total = 0
    for text in documents:
        first, *others = (list(encode(text)) for encode in compared.values())
        if any(other != first for other in others):
            raise ValueError(f"the ids of a document differ: {text[:80]!r}")
        total += len(first)
    for _ in range(repeats):
        for name, encode in compared.items():
            started = time.process_time()
            for text in documents:
                encode(text)
            rates[name].append(total / (time.process_time() - started))
    base = rates["Hugging Face tokenizers"]
    return {
        "tokens": total,
        "bytes_per_token": round(sum(len(text.encode()) for text in documents) / total, 3),
        "tokens_per_cpu_second": {name: spread(found, 0) for name, found in rates.items()},
        "ratio_to_hugging_face": {
            name: round(statistics.median(a / b for a, b in zip(found, base, strict=True)), 2)
            for name, found in rates.items()
        },
    }


def measure_training(documents: Iterator[str], vocab_size: int, max_chars: int) -> dict[str, Any]:
    """Train with rustbpe on at most so many characters of the documents."""
    read = list(first_characters(documents, max_chars))
    cpu, wall = time.process_time(), time.perf_counter()
    tokenizer = train_tokenizer(read, vocab_size=vocab_size, max_chars=max_chars, doc_cap=max_chars)
    return {
        "characters": sum(map(len, read)),
        "asked_for": vocab_size,
        "vocab_size": tokenizer.vocab_size,  # rustbpe gives fewer where the text has no more merges
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "wall_seconds": round(time.perf_counter() - wall, 2),
    }


def first_characters(documents: Iterator[str], count: float) -> Iterator[str]:
    """Yield documents until they have `count` characters in all."""
    seen = 0
    for text in documents:
        if seen >= count:
            return
        seen += len(text)
        yield text


def main(argv: list[str]) -> int:
    parser = bench.options("tokenizer", __doc__, data=True, vocab_size=65_536, repeats=5)
    add = parser.add_argument
    add("--tokenizer", help="its folder; by default one of --vocab_size is trained on the data and kept")
    add("--characters", type=float, default=8e6, help="of text to encode")
    add("--train_characters", type=float, default=40e6, help="of text to train on; 0 trains nothing")
    options = parser.parse_args(argv)
    tokenizer = load_tokenizer(bench.tokenizer_of(options))
    dataset = open_dataset(runtime.dataset_dir(options.data))
    documents = list(first_characters(texts(dataset), options.characters))
    progress(f"encoding {len(documents):,} documents {options.repeats} times in each way")
    machine.reset_peak_memory(CPU)
    result = {
        "benchmark": "tokenizer",
        **machine.describe(CPU),
        "tokenizers": {name: version(name) for name in ("tiktoken", "tokenizers", "rustbpe")},
        "settings": {
            "data": dataset.path.name,
            "vocab_size": tokenizer.vocab_size,
            "documents": len(documents),
            "characters": sum(map(len, documents)),
            "repeats": options.repeats,
        },
        "encode": measure_encoding(tokenizer, documents, options.repeats),
    }
    if options.train_characters:
        progress("training")
        characters = int(options.train_characters)
        result["train"] = measure_training(texts(dataset), options.vocab_size, characters)
    result["peak_memory_mb"] = round(machine.peak_memory_mb(CPU), 1)
    if options.json:
        print_json(result)
    else:
        show(result)
    return 0


def show(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    encode = result["encode"]
    print(f"{result['hardware']}  {result['versions']}  {result['tokenizers']}")
    print(f"commit {result['commit']}  load {result['load_average']}")
    print("  ".join(f"{name} {cell(value)}" for name, value in result["settings"].items()))
    rows = [
        [name, quartiles(rate), encode["ratio_to_hugging_face"][name]]
        for name, rate in encode["tokens_per_cpu_second"].items()
    ]
    print(table(rows, ["", "tokens / CPU s, median (quartiles)", "to Hugging Face"]))
    print(f"{encode['tokens']:,} tokens of {encode['bytes_per_token']} bytes, all ids equal")
    if train := result.get("train"):
        print(
            f"rustbpe: {train['vocab_size']:,} tokens ({train['asked_for']:,} asked for) from {train['characters']:,} characters "
            f"in {train['cpu_seconds']} CPU s, {train['wall_seconds']} s"
        )
    print(f"peak memory {result['peak_memory_mb']} MB")
