from __future__ import annotations

import pytest
import torch

from nanofed.model import GPT, GPTConfig


@pytest.fixture(scope="package")
def model() -> GPT:
    """A model of single bytes and a bos behind them, whose every weight counts."""
    model = GPT(GPTConfig(sequence_len=16, vocab_size=257, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.2, generator=generator)
    return model
