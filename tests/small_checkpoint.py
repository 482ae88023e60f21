"""A checkpoint of a few hundred kilobytes whose every value tells which save wrote it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from nanofed.model import GPTConfig
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.tokenizer.training import train_tokenizer
from nanofed.training.checkpoint.format import read_manifest, read_state, read_weights, write_checkpoint

CONFIG = GPTConfig(sequence_len=8, vocab_size=270, n_layer=1, n_head=2, n_kv_head=2, n_embd=8)
NAMES = ("transformer.wte.weight", "lm_head.weight")


@functools.cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(["some words and other words"] * 3, vocab_size=270)


def save_small(path: Path, number: int, values: int = 20_000) -> Path:
    """Save a checkpoint that is full of `number`, of about 16 bytes for each of the `values`."""
    weights = {name: torch.full((values,), float(number)) for name in NAMES}
    state = {"number": number, "momentum": [torch.full((values,), number) for _ in range(2)]}
    model: dict[str, Any] = {"weights": weights, "state": state, "config": CONFIG, "tokenizer": small_tokenizer()}
    write_checkpoint(path, kind="fit", **model, step=number, tokens=number)
    return path


def number_in(path: Path) -> int:
    """Return which save wrote a checkpoint, having looked at all that it holds."""
    manifest, weights, state = read_manifest(path), read_weights(path), read_state(path)
    number = manifest.step
    assert (manifest.tokens, state["number"]) == (number, number)
    for tensor in (*(weights[name] for name in NAMES), *state["momentum"]):
        assert bool((tensor == number).all()), f"{path} is a mixture"
    assert Tokenizer.load(path / "tokenizer").fingerprint == small_tokenizer().fingerprint
    return number
