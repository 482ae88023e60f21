from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanofed.errors import ConfigError
from nanofed.model import GPT, KVCache


@pytest.mark.parametrize("chunks", [(1,) * 20, (12, 1, 1, 1, 1, 1, 1, 1, 1), (7, 6, 7), (20,)])
def test_reading_in_chunks_gives_the_logits_of_reading_at_once(
    model: GPT, ids: Tensor, chunks: tuple[int, ...]
) -> None:
    cache = KVCache(model.config, batch_size=2, length=20)
    with torch.no_grad():
        pieces = [model(piece, kv_cache=cache) for piece in torch.split(ids, list(chunks), dim=1)]
        expected = model(ids)
    assert cache.lengths == [20, 20]
    assert torch.allclose(torch.cat(pieces, dim=1), expected, atol=2e-6)


def test_a_full_cache_refuses_more(model: GPT, ids: Tensor) -> None:
    cache = KVCache(model.config, batch_size=2, length=19)
    with torch.no_grad(), pytest.raises(ConfigError, match="20 tokens do not fit into the 19"):
        model(ids, kv_cache=cache)


def test_positions_before_the_chunk_count_against_the_tables(model: GPT) -> None:
    cache = KVCache(model.config, batch_size=1, length=400)
    with torch.no_grad():
        model(torch.zeros(1, 320, dtype=torch.long), kv_cache=cache)
        with pytest.raises(ConfigError, match="321 tokens"):
            model(torch.zeros(1, 1, dtype=torch.long), kv_cache=cache)


def test_rows_of_unequal_lengths_see_nothing_of_their_padding(model: GPT, ids: Tensor) -> None:
    cache = KVCache(model.config, batch_size=2, length=20)
    with torch.no_grad():
        model(ids[:, :9], kv_cache=cache)
        cache.truncate([9, 4])  # of the second row, five tokens were padding
        assert cache.lengths == [9, 4]
        rows = [
            torch.stack([ids[0, n : n + size], ids[1, n - 5 : n - 5 + size]]) for n, size in ((9, 1), (10, 3), (13, 7))
        ]
        last = torch.cat([model(chunk, kv_cache=cache) for chunk in rows], dim=1)
        expected = model(ids)
    assert cache.lengths == [20, 15]
    assert torch.allclose(last[0], expected[0, 9:], atol=2e-6)
    assert torch.allclose(last[1], expected[1, 4:15], atol=2e-6)


def test_a_fork_goes_on_from_copies_of_the_rows_that_are_named(model: GPT, ids: Tensor) -> None:
    cache = KVCache(model.config, batch_size=2, length=12)
    with torch.no_grad():
        model.hidden_states(ids[:, :12], kv_cache=cache)
        rows = torch.tensor([1, 0, 1])
        forked = cache.fork(rows, length=20)
        logits = model(ids[rows, 12:], kv_cache=forked)
        whole = model(ids)[rows, 12:]
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
    assert (cache.lengths, forked.lengths) == ([12, 12], [20, 20, 20])
