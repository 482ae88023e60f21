"""Causal attention on CPU in blocks of queries: each block's matmuls skip the keys after it.

SDPA's kernel on CPU works in small tiles; whole blocks of rows keep the matrix units of oneDNN and MKL busy. The weights of
each block are kept for the backward pass (B · n_head · T² / 2 numbers), which is why long rows stay with SDPA.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

BLOCK = 128  # queries at once


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let each query attend to the keys up to its own position, on CPU, differentiably.

    The weights are exponentials without the usual subtraction of the maximum: RMS-normed queries and keys bound every
    score by √D (11.3 for heads of 128), far from where fp32 or bf16 overflow (88).

    Args:
        q: RMS-normed queries (B, T, n_head, D).
        k: RMS-normed keys (B, T, n_kv_head, D); n_kv_head divides n_head.
        v: Values, as `k`.

    Returns:
        The mixed values (B, T, n_head, D), scaled dot products by 1/√D.
    """
    return cast(Tensor, _attend(q, k, v)[0])


def _spans(T: int) -> list[tuple[int, int, int]]:
    """Return begin and end of every block of queries, and where its weights begin in the packed row of a head."""
    spans, offset = [], 0
    for begin in range(0, T, BLOCK):
        end = min(begin + BLOCK, T)
        spans.append((begin, end, offset))
        offset += (end - begin) * end
    return spans


def _packed(T: int) -> int:
    """Return the weights of one head, all blocks together."""
    begin, end, offset = _spans(T)[-1]
    return offset + (end - begin) * end


def _by_head(x: Tensor, group: int) -> Tensor:
    """Lay (B, T, H, D) out as (B·H·group, T, D), repeating each of the keys' heads for its group of queries."""
    B, T, H, D = x.shape
    return x.transpose(1, 2).unsqueeze(2).expand(B, H, group, T, D).reshape(B * H * group, T, D)


@torch.library.custom_op("nanofed::blocked_attention", mutates_args=(), device_types="cpu")
def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, T, n_head, D), the packed weights before their division, and their sums (heads, T, 1)."""
    B, T, H, D = q.shape
    group = H // k.size(2)
    scale = D**-0.5
    q, k, v = _by_head(q, 1), _by_head(k, group), _by_head(v, group)
    heads = q.size(0)
    weights = q.new_empty(heads, _packed(T))
    sums = q.new_empty(heads, T, 1, dtype=torch.float32)
    y = torch.empty_like(q)
    triangle = q.new_ones(BLOCK, BLOCK).tril_()
    for begin, end, offset in _spans(T):
        rows = end - begin
        p = weights[:, offset : offset + rows * end].view(heads, rows, end)
        torch.baddbmm(p, q[:, begin:end], k[:, :end].mT, beta=0, alpha=scale, out=p)
        p.exp_()
        p[:, :, begin:].mul_(triangle[:rows, :rows])
        torch.sum(p, -1, keepdim=True, dtype=torch.float32, out=sums[:, begin:end])
        y[:, begin:end] = torch.bmm(p, v[:, :end]).div_(sums[:, begin:end])
    return y.view(B, H, T, D).transpose(1, 2).contiguous(), weights, sums


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _D = q.shape
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(B * H, _packed(T)),
        q.new_empty(B * H, T, 1, dtype=torch.float32),
    )


@torch.library.custom_op("nanofed::blocked_attention_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, weights: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    B, T, H, D = q.shape
    kv_heads = k.size(2)
    group = H // kv_heads
    scale = D**-0.5
    dy, y, q, k, v = _by_head(dy, 1), _by_head(y, 1), _by_head(q, 1), _by_head(k, group), _by_head(v, group)
    heads = q.size(0)
    dy = (dy / sums).to(q.dtype)
    delta = (dy * y).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for begin, end, offset in _spans(T):
        rows = end - begin
        p = weights[:, offset : offset + rows * end].view(heads, rows, end)
        dv[:, :end].baddbmm_(p.mT, dy[:, begin:end])
        ds = torch.bmm(dy[:, begin:end], v[:, :end].mT).sub_(delta[:, begin:end]).mul_(p)
        dq[:, begin:end] = torch.bmm(ds, k[:, :end]).mul_(scale)
        dk[:, :end].baddbmm_(ds.mT, q[:, begin:end], alpha=scale)
    grouped = (B, kv_heads, group, T, D)
    return (
        dq.view(B, H, T, D).transpose(1, 2).contiguous(),
        dk.view(grouped).sum(2).transpose(1, 2).contiguous(),
        dv.view(grouped).sum(2).transpose(1, 2).contiguous(),
    )


@_attend_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, weights: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dense = torch.contiguous_format
    return (
        torch.empty_like(q, memory_format=dense),
        torch.empty_like(k, memory_format=dense),
        torch.empty_like(v, memory_format=dense),
    )


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor, _weights: None, _sums: None) -> tuple[Tensor, ...]:
    return cast(tuple[Tensor, ...], _attend_backward(dy, *ctx.saved_tensors))


_attend.register_autograd(_differentiate, setup_context=_keep)
