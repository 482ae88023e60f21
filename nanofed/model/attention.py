"""Attention behind one signature: faster kernels go in here, and nothing else changes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let each query attend to the keys up to its own position.

    Args:
        q: Queries (B, Tq, n_head, D); they are the last Tq of the Tk positions.
        k: Keys (B, Tk, n_kv_head, D), Tk ≥ Tq; n_kv_head divides n_head.
        v: Values, as `k`.

    Returns:
        The mixed values (B, Tq, n_head, D), scaled dot products by 1/√D.
    """
    Tq, Tk = q.size(1), k.size(1)
    grouped = q.size(2) != k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if Tq == Tk:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif Tq == 1:
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)  # the newest token sees everything
    else:
        # is_causal would align the triangle with the first key; here the last query meets the last key.
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(diagonal=Tk - Tq)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2)
