"""The October 2025 nanochat GPT (karpathy/nanochat at 2e93853), under nanochat's names: weights load both ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanofed.errors import ConfigError
from nanofed.model.attention import causal_attention, decoding_kernels
from nanofed.model.config import GPTConfig
from nanofed.model.kv_cache import KVCache
from nanofed.model.layers import Linear, apply_rotary, norm, rotary_tables
from nanofed.model.loss import capped_logits, head_loss


class CausalSelfAttention(nn.Module):
    """Attention with rotary positions, then RMS-normed queries and keys."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.c_q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache | None) -> Tensor:
        """Mix (B, T, n_embd) over positions."""
        heads = (-1, self.head_dim)
        q = norm(apply_rotary(self.c_q(x).unflatten(-1, heads), cos, sin))  # (B, T, n_head, D)
        k = norm(apply_rotary(self.c_k(x).unflatten(-1, heads), cos, sin))  # (B, T, n_kv_head, D)
        v = self.c_v(x).unflatten(-1, heads)
        mask = None
        if kv_cache is not None:
            k, v, mask = kv_cache.append(self.layer, k, v)
        y: Tensor = self.c_proj(causal_attention(q, k, v, mask, cached=kv_cache is not None).flatten(-2))
        return y


class MLP(nn.Module):
    """Four times as wide inside, with ReLU² (So et al. 2021, arXiv:2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, T, n_embd) position by position."""
        y: Tensor = self.c_proj(F.relu(self.c_fc(x)).square())
        return y


class Block(nn.Module):
    """Pre-norm attention and MLP on the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache | None) -> Tensor:
        """Add both to (B, T, n_embd)."""
        x = x + self.attn(norm(x), cos, sin, kv_cache)
        return x + self.mlp(norm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """The embedding and the blocks; their names are nanochat's."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))


class GPT(nn.Module):
    """A decoder-only language model with fp32 weights, whose matmuls run in `compute_dtype`.

    Activations are cast right after the embedding's lookup and every matrix casts its own weight, so there is no
    autocast, and gradients and optimizer state stay in fp32. Construction leaves weights as PyTorch makes them: call
    `init_weights`, or load a state dict. On the meta device: `to_empty(device=…)`, then one of the two.

    Args:
        config: The sizes.
        compute_dtype: Dtype of activations and matmuls.
        rotary_dtype: Dtype of the rotary tables; nanochat's is bf16, and transformers' follows the activations.

    Example:
        >>> gpt = nanofed.GPT(nanofed.GPTConfig.from_depth(2, vocab_size=512, sequence_len=64))
        >>> gpt.init_weights(seed=42)
        >>> tokens = torch.randint(512, (1, 65))
        >>> gpt(tokens[:, :-1]).shape  # logits (B, T, vocab)
        torch.Size([1, 64, 512])
        >>> print(f"{gpt(tokens[:, :-1], tokens[:, 1:]):.3f}")  # the loss in nats a token: ln 512 before training
        6.238
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: GPTConfig,
        *,
        compute_dtype: torch.dtype = torch.float32,
        rotary_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.rotary_dtype = rotary_dtype
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self._build_rotary()
        self.register_load_state_dict_post_hook(_rebuild_rotary)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.wte.weight.device

    @property
    def max_positions(self) -> int:
        """Positions that the rotary tables hold: the longest sequence the model can read."""
        return self.config.max_positions

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw October's initial weights: the same for a seed on every device, whatever was drawn elsewhere before.

        Embedding: standard deviation 1. Head and every `c_proj`: zero, so that each block starts as the identity.
        Other matrices: 1/√fan_in · min(1, √(fan_out/fan_in)) (Yang et al. 2023, arXiv:2310.17813).

        Raises:
            ConfigError: the model is still on the meta device.
        """
        if self.device.type == "meta":
            raise ConfigError("model: weights on the meta device cannot be drawn; call to_empty(device=…) first")
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name == "lm_head.weight" or name.endswith(".c_proj.weight"):
                weight.zero_()
                continue
            fan_out, fan_in = weight.shape
            std = 1.0 if name == "transformer.wte.weight" else min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
            weight.copy_(torch.empty(weight.shape, device="cpu").normal_(std=std, generator=generator))
        self._build_rotary()

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        kv_cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Predict the next token at every position, or score the targets.

        Args:
            inputs: Token ids (B, T), int64.
            targets: The ids that should follow, (B, T); -1 marks positions that do not count.
            kv_cache: What was read before; `inputs` continue it and are added to it.
            reduction: Of the loss: "mean", "sum" or "none".

        Returns:
            Without targets fp32 logits (B, T, vocab) within ±15; with targets the loss in nats, a scalar or (B·T,).

        Raises:
            ConfigError: the sequence is longer than the rotary tables.
        """
        x = self.hidden_states(inputs, kv_cache)
        if targets is None:
            return capped_logits(x, self.lm_head.weight)
        return head_loss(x, self.lm_head.weight, targets, reduction=reduction)

    def hidden_states(self, inputs: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """Return what the head reads, (B, T, n_embd) in the compute dtype; arguments and errors as in `forward`.

        Whoever needs few positions of long rows multiplies only these by the head.
        """
        T = inputs.size(1)
        end = T if kv_cache is None else max(kv_cache.lengths) + T
        if end > self.max_positions:
            raise ConfigError(f"model: {end} tokens are more than the {self.max_positions} positions it can read")
        positions = slice(0, T) if kv_cache is None else kv_cache.begin(T)
        cos, sin = self.cos[positions], self.sin[positions]

        x = norm(self.transformer.wte(inputs).to(self.compute_dtype))
        with nullcontext() if kv_cache is None else decoding_kernels():
            for block in self.transformer.h:
                x = block(x, cos, sin, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(T)
        return norm(x)

    def _build_rotary(self) -> None:
        cos, sin = rotary_tables(self.max_positions, self.config.head_dim, device=self.device, dtype=self.rotary_dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # No checkpoint holds the tables, so nothing else repairs them: to_empty leaves garbage, .to(dtype) rounds them.
        module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._build_rotary()
        return module


def _rebuild_rotary(module: nn.Module, _incompatible_keys: object) -> None:
    """Follow weights that loading with `assign=True` brought from the meta device to a real one."""
    assert isinstance(module, GPT)
    if module.cos.device != module.device:
        module._build_rotary()
