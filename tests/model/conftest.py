from __future__ import annotations

import pytest
import torch

from nanofed.model import GPT, GPTConfig

CONFIG = GPTConfig(sequence_len=32, vocab_size=97, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)


@pytest.fixture
def model() -> GPT:
    """A small grouped-query model in which no weight is zero, so that every part shows in the output."""
    model = GPT(CONFIG)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty(p.shape).normal_(std=0.1, generator=generator))
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (2, 20), generator=torch.Generator().manual_seed(2))
