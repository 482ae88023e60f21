"""What tests of exports share: a run of either path, and one whose random weights use every part of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanofed.model import GPT, GPTConfig
from nanofed.optim import Clock, MuonAdamW, Schedule, parameter_groups
from nanofed.tokenizer.training import train_tokenizer
from nanofed.training.checkpoint.format import write_checkpoint
from tests.cli.conftest import (  # noqa: F401  (fixtures)
    TEXTS,
    _own_log_settings,
    corpus,
    federated_run,
    fit_run,
)


@pytest.fixture(scope="session")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three layers and grouped queries whose weights and moments are all random, after two steps."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    config = GPTConfig(sequence_len=48, vocab_size=tokenizer.vocab_size, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)
    model = GPT(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.any():  # zero at the start, which would hide every difference
                weight.normal_(std=0.25 if name == "lm_head.weight" else 0.1, generator=generator)
    clock = Clock(step_tokens=96, horizon_tokens=960)
    optimizer = MuonAdamW(parameter_groups(model), schedule=Schedule(), clock=clock)
    for _ in range(2):
        ids = torch.randint(0, tokenizer.vocab_size, (2, 49), generator=generator)
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    state: dict[str, Any] = {"optimizer_states": [optimizer.state_dict()]}
    path = tmp_path_factory.mktemp("wild") / "checkpoints" / "step_00000002"
    path.parent.mkdir()
    write_checkpoint(
        path,
        kind="fit",
        weights=model.state_dict(),
        state=state,
        config=config,
        tokenizer=tokenizer,
        step=2,
        tokens=192,
        metrics={"val/bpb": 3.25},
    )
    return path
