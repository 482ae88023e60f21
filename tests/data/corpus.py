"""Small real shards and a tokenizer of bytes, for tests of what reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nanofed.data.packing import Tokens
from nanofed.data.shards import Dataset, all_texts, open_dataset
from nanofed.data.writing import write_shards


class Bytes:
    """A token a byte, and 256 begins a document: ids can be counted by hand."""

    def encode_document(self, text: str) -> Tokens:
        return np.array([256, *text.encode()], np.int32)


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
