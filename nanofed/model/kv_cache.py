"""Keys and values of the tokens that were already read, so that generation reads each token once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from nanofed.errors import ConfigError
from nanofed.model.config import GPTConfig


class KVCache:
    """Keys and values of every layer, of a fixed shape; slot p of a row holds the row's position p.

    Rows may be of different lengths: prompts are read together, padded on the right, and `truncate` forgets the padding.
    What a row has not written is masked, so that no row depends on another one.

    Args:
        config: The model's sizes.
        batch_size: Rows that are generated side by side.
        length: Tokens there is room for in each row.
        device: Where the model is.
        dtype: The model's compute dtype.

    Attributes:
        lengths: Tokens read of each row; the model counts them after a forward pass, when all layers have appended.
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
        shape = (config.n_layer, 2, batch_size, config.n_kv_head, length, config.head_dim)
        # Zeros: a masked slot counts 0 times, which NaN would survive.
        self._store = torch.zeros(shape, device=device, dtype=dtype)
        self._rows = torch.arange(batch_size, device=device)[:, None]
        self._slots: slice | Tensor = slice(0, 0)
        self._mask: Tensor | None = None
        self.length = length
        self.lengths = [0] * batch_size

    def begin(self, tokens: int) -> slice | Tensor:
        """Take up `tokens` more of each row and return their positions: a slice if rows are equally long, else (B, T).

        Raises:
            ConfigError: there is no room for them.
        """
        end = max(self.lengths) + tokens
        if end > self.length:
            raise ConfigError(f"KV cache: {end} tokens do not fit into the {self.length} it was made for")
        self._end, self._mask = end, None
        if min(self.lengths) == max(self.lengths):
            self._slots = slice(end - tokens, end)
            return self._slots
        device = self._store.device
        starts = torch.tensor(self.lengths, device=device)[:, None]
        self._slots = slots = starts + torch.arange(tokens, device=device)  # (B, T)
        self._mask = (torch.arange(end, device=device) <= slots[..., None]).unsqueeze(1)  # (B, 1, T, end)
        return slots

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store a layer's new keys and values (B, T, n_kv_head, D) at the positions that `begin` returned.

        Returns:
            All keys and values so far (B, Tk, n_kv_head, D), and which of them each query may see (B, 1, T, Tk); None
            stands for the causal mask of rows that are equally long.
        """
        for store, new in zip(self._store[layer], (k, v), strict=True):
            if isinstance(self._slots, slice):
                store[:, :, self._slots] = new.transpose(1, 2)
            else:
                store[self._rows, :, self._slots] = new
        k, v = self._store[layer, :, :, :, : self._end].transpose(2, 3)
        return k, v, self._mask

    def advance(self, tokens: int) -> None:
        """Count `tokens` that every layer has appended to every row."""
        self.lengths = [length + tokens for length in self.lengths]

    def truncate(self, lengths: list[int]) -> None:
        """Forget what each row holds beyond a length, such as the padding of its prompt."""
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]

    def fork(self, rows: Tensor, *, length: int) -> KVCache:
        """Return a new cache of `length` tokens whose row i goes on from a copy of this one's row `rows[i]` (int64)."""
        forked, filled = copy.copy(self), max(self.lengths)
        forked.length = length
        forked.lengths = [self.lengths[row] for row in rows.tolist()]
        forked._rows = torch.arange(len(rows), device=rows.device)[:, None]
        forked._store = self._store.new_zeros(
            (*self._store.shape[:2], len(rows), self._store.shape[3], length, self._store.shape[5])
        )
        forked._store[:, :, :, :, :filled] = self._store[:, :, rows, :, :filled]
        return forked
