"""Keys and values of the tokens that were already read, so that generation reads each token once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from nanofed.errors import ConfigError
from nanofed.model.config import GPTConfig


class KVCache:
    """Preallocated keys and values of every layer, filled from the left.

    `position` counts the tokens in it; the model moves it after a forward pass, when all layers have appended.

    Args:
        config: The model's sizes.
        batch_size: Sequences that are generated side by side, all equally long.
        length: Tokens there is room for.
        device: Where the model is.
        dtype: The model's compute dtype.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        batch_size: int,
        length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.n_layer, 2, batch_size, length, config.n_kv_head, config.head_dim)
        self._store = torch.empty(shape, device=device, dtype=dtype)
        self.length = length
        self.position = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, T, n_kv_head, D) and return all so far (B, position + T, …).

        Raises:
            ConfigError: there is no room for them.
        """
        end = self.position + k.size(1)
        if end > self.length:
            raise ConfigError(f"KV cache: {end} tokens do not fit into the {self.length} it was made for")
        self._store[layer, 0, :, self.position : end] = k
        self._store[layer, 1, :, self.position : end] = v
        return self._store[layer, 0, :, :end], self._store[layer, 1, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` that every layer has appended."""
        self.position += tokens

    def fork(self, rows: Tensor, *, length: int) -> KVCache:
        """Return a new cache of `length` tokens whose row i goes on from a copy of this one's row `rows[i]` (int64)."""
        forked = copy.copy(self)
        forked.length = length
        forked._store = self._store.new_empty((*self._store.shape[:2], len(rows), length, *self._store.shape[4:]))
        forked._store[:, :, :, : self.position] = self._store[:, :, rows, : self.position]
        return forked
