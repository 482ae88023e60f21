from __future__ import annotations

from typing import Any

import pytest
import torch

from nanofed.errors import ConfigError
from nanofed.model import GPT, GPTConfig


@pytest.mark.parametrize(("depth", "count"), [(20, 560_988_160), (32, 1_879_048_192)])
def test_published_parameter_counts(depth: int, count: int) -> None:
    config = GPTConfig.from_depth(depth)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == count
    assert config.num_parameters == count


def test_d20_is_the_default() -> None:
    assert GPTConfig.from_depth(20) == GPTConfig()


def test_counts_follow_grouped_query_attention() -> None:
    config = GPTConfig(sequence_len=16, vocab_size=50, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)
    with torch.device("meta"):
        model = GPT(config)
    assert config.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("depth", "width", "heads"), [(1, 64, 1), (2, 128, 1), (3, 192, 2), (4, 256, 2), (12, 768, 6)])
def test_depth_sets_width_and_heads(depth: int, width: int, heads: int) -> None:
    config = GPTConfig.from_depth(depth, vocab_size=100, sequence_len=8)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_kv_head) == (depth, width, heads, heads)
    assert (config.vocab_size, config.sequence_len) == (100, 8)


@pytest.mark.parametrize("depth", [0, -4, 5, 2.0, True, "4"])
def test_impossible_depths_are_refused(depth: Any) -> None:
    with pytest.raises(ConfigError, match="depth"):
        GPTConfig.from_depth(depth)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"n_layer": 0}, "n_layer"),
        ({"n_layer": 10_000_000}, "n_layer is 10,000,000, of 1,000 at most"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"n_embd": 100, "n_head": 3}, "n_embd 100"),
        ({"n_embd": 6, "n_head": 2}, "even width"),  # heads of 3 have no pairs to rotate
        ({"n_kv_head": 3}, "n_kv_head 3"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**override)
