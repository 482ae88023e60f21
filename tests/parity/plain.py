"""The plain path: the October 2025 model and step written the simplest way, as reference of correctness and of speed.

Nothing here is clever: fp32 everywhere, torch's scaled dot-product attention, the whole (B·T, vocab) matrix of logits, one
Newton–Schulz a matrix, torch's own AdamW. Only sizes and rates come from nanofed, so that both sides train the same thing.
Formulas: karpathy/nanochat at dfc8833 (October 2025).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanofed.model import GPTConfig
from nanofed.optim import Clock, Schedule, parameter_groups

LOGIT_CAP = 15.0


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotary(T: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, head_dim / 2): computed in fp32, kept in bf16 as October does."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(T, dtype=torch.float32, device=device), frequencies)[:, None, :]
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1).to(x.dtype)


class PlainAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=False)
        self.c_k = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = norm(rotate(self.c_q(x).view(B, T, self.n_head, self.head_dim), cos, sin)).transpose(1, 2)
        k = norm(rotate(self.c_k(x).view(B, T, self.n_kv_head, self.head_dim), cos, sin)).transpose(1, 2)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_head != self.n_kv_head)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.c_proj(y)  # type: ignore[no-any-return]


class PlainMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())  # type: ignore[no-any-return]


class PlainBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn = PlainAttention(config)
        self.mlp = PlainMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), cos, sin)
        return x + self.mlp(norm(x))  # type: ignore[no-any-return]


class PlainGPT(nn.Module):
    """The model, whose state dict has nanofed's names: `PlainGPT(config).load_state_dict(gpt.state_dict())`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd), "h": blocks})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rotary(config.sequence_len, config.head_dim, self.lm_head.weight.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Return logits (B, T, vocab), or with targets the loss in nats."""
        T = inputs.size(1)
        x = norm(self.transformer["wte"](inputs))
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x, self.cos[:T], self.sin[:T])
        logits = LOGIT_CAP * torch.tanh(self.lm_head(norm(x)) / LOGIT_CAP)
        logits = logits.float()
        if targets is None:
            return logits
        flat = logits.view(-1, logits.size(-1))
        return F.cross_entropy(flat, targets.reshape(-1), ignore_index=-1, reduction=reduction)


def newton_schulz(gradient: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Orthogonalize one matrix (https://kellerjordan.github.io/posts/muon/)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.to(dtype)
    if gradient.size(0) > gradient.size(1):
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if gradient.size(0) > gradient.size(1) else x  # type: ignore[no-any-return]


class PlainOptimizer:
    """The October step: clip the global norm, AdamW for embedding and head, Muon for one matrix after the other.

    Args:
        model: With a GPT's parameter names.
        schedule: Rate and momentum; October's by default.
        clock: Where the run is; the step moves it.
        clip: Greatest global norm.
        ns_dtype: Of Newton–Schulz; October's is bf16 everywhere, which a CPU without bf16 units only emulates.
        compile: Compile Newton–Schulz, as October does.
        rates: Of `parameter_groups`; October's by default.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        clock: Clock,
        schedule: Schedule | None = None,
        clip: float = 1.0,
        ns_dtype: torch.dtype = torch.bfloat16,
        compile: bool = False,
        **rates: Any,
    ) -> None:
        head, embedding, matrices = parameter_groups(model, **rates)
        adamw = [
            {name: group[name] for name in ("params", "lr", "betas", "eps", "weight_decay")}
            for group in (head, embedding)
        ]
        self.adamw = torch.optim.AdamW(adamw, fused=True)
        self.adamw_lrs = [group["lr"] for group in adamw]
        self.matrices: list[nn.Parameter] = matrices["params"]
        self.muon_lr: float = matrices["lr"]
        self.buffers = [torch.zeros_like(p) for p in self.matrices]
        self.parameters = list(model.parameters())
        self.schedule = schedule or Schedule()
        self.clock = clock
        self.clip = clip
        self.ns_dtype = ns_dtype
        self.orthogonalize = torch.compile(newton_schulz) if compile else newton_schulz

    @torch.no_grad()
    def step(self) -> None:
        """Move all parameters once."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        scale = self.schedule.scale(self.clock.step_tokens, self.clock.horizon_tokens)
        multiplier = scale * self.schedule.lr_multiplier(self.clock.progress)
        momentum = self.schedule.momentum(self.clock.step)
        for group, lr in zip(self.adamw.param_groups, self.adamw_lrs, strict=True):
            group["lr"] = lr * multiplier
            group["betas"] = (group["betas"][0], self.schedule.beta2(self.clock.batch_tokens))
        self.adamw.step()
        for p, buffer in zip(self.matrices, self.buffers, strict=True):
            assert p.grad is not None
            buffer.lerp_(p.grad, 1 - momentum)
            update = self.orthogonalize(p.grad.lerp(buffer, momentum), self.ns_dtype)
            p.add_(update, alpha=-self.muon_lr * multiplier * math.sqrt(max(1.0, p.size(0) / p.size(1))))
        self.clock.advance()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.parameters:
            p.grad = None
