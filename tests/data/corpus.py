"""Small real shards and a tokenizer of bytes, for tests of what reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nanofed.data.shards import Dataset, all_texts, open_dataset
from nanofed.data.writing import write_shards
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.tokenizer.vocabulary import SPLIT_PATTERN, Vocabulary


class Bytes(Tokenizer):
    """A token a byte, and 256 begins a document: ids can be counted by hand."""

    def __init__(self) -> None:
        super().__init__(Vocabulary(tuple(bytes([byte]) for byte in range(256)), ("<|bos|>",), SPLIT_PATTERN))


def texts(count: int, seed: int, *, longest: int = 60) -> list[str]:
    """Documents that differ in their first characters, of very different lengths, some of them empty."""
    generator = random.Random(seed)
    lengths = [0 if generator.random() < 0.05 else generator.randint(1, longest) for _ in range(count)]
    return ["".join(generator.choices("abcdefgh \né", k=length)) for length in lengths]


def build(folder: Path, documents: Sequence[str], *, shards: int = 3, rows_per_group: int = 7) -> Dataset:
    """Write `shards` training shards and one for validation."""
    return write_shards(documents, folder, num_shards=shards, rows_per_group=rows_per_group)


def documents(dataset: Dataset, shard: str) -> list[str]:
    """Return all texts of a training shard."""
    found = next(s for s in dataset.train if s.name == shard)
    return list(all_texts(found))


def fewer(dataset: Dataset, num_shards: int) -> Dataset:
    """Open the same folder with its first training shards only."""
    return replace(open_dataset(dataset.path, num_shards=num_shards))
