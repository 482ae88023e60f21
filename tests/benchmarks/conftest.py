"""A small corpus of random words for benchmarks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from nanofed.data.writing import write_shards


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # the tests' own process keeps what it has
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(1, 9))) for _ in range(2000)]
    texts = [" ".join(generator.choices(words, k=200)) for _ in range(240)]
    write_shards(texts, tmp_path / "data", num_shards=3, rows_per_group=8)
    return str(tmp_path / "data")
