"""Compiling: whole graphs, and none of them made again in the steady state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from nanofed import runtime
from nanofed.data.streams import Batch, DataState
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(runtime.why_not_compiled() is not None, reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inductor's own
]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GPTModule:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    recipe = Recipe(batch_tokens=128, num_steps=100)
    module = GPTModule(depth=1, sequence_len=32, vocab_size=300, compile=True, recipe=recipe)
    module.configure_model()
    module.count_bytes_with(torch.ones(300, dtype=torch.int64))
    return module


def test_steps_and_validations_compile_once(module: GPTModule) -> None:
    optimizer = module.configure_optimizers()
    generator = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        ids = torch.randint(0, 300, (2, 33), generator=generator)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), DataState(0, {}))

    def step() -> None:
        for _ in range(2):
            loss = module.training_step(batch())
            torch.autograd.backward(loss / 2)
        optimizer.step()
        optimizer.zero_grad()

    def validate() -> None:
        module.eval()
        with torch.no_grad():
            module.validation_step(batch())
        module.train()

    counters.clear()
    step()
    validate()
    step()
    assert counters["graph_break"] == {}
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for _ in range(4):  # rates and momentum move at every step
        step()
        validate()
    assert counters["stats"]["unique_graphs"] == graphs
