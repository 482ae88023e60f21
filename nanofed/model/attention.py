"""Attention behind one signature: faster kernels go in here, and nothing else changes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanofed.model.blocked_attention import blocked_attention

# The longest rows for which the blocked kernel beats SDPA's flash kernel on CPU, forward and backward (measured: fp32 on
# AVX2 1.2x at 512, 1.0x at 1,024, slower at 2,048; bf16 on AVX512-BF16 2.5x at 512 and 1.6x at 2,048).
BLOCKED_LONGEST = {torch.float32: 512, torch.bfloat16: 2048}


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let each query attend to the keys up to its own position.

    On CUDA this is SDPA, which picks cuDNN, flash (version 3 or 4 where `use_flash_attention` found one) or its own.

    Args:
        q: RMS-normed queries (B, Tq, n_head, D); they are the last Tq of the Tk positions.
        k: RMS-normed keys (B, Tk, n_kv_head, D), Tk ≥ Tq; n_kv_head divides n_head.
        v: Values, as `k`.

    Returns:
        The mixed values (B, Tq, n_head, D), scaled dot products by 1/√D.
    """
    Tq, Tk = q.size(1), k.size(1)
    grouped = q.size(2) != k.size(2)
    if Tq == Tk and _blocked_is_faster(q):
        return blocked_attention(q, k, v)
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


def use_flash_attention() -> str | None:
    """Have SDPA on CUDA use the newest FlashAttention that is installed and fits the GPU, and return its name.

    FlashAttention 3 wants a Hopper GPU and the package `flash_attn_interface`, FlashAttention 4 a Hopper or Blackwell one
    and `flash_attn.cute`; PyTorch's registry says which it knows. None: SDPA keeps its own kernels.
    """
    from torch.nn import attention

    if not torch.cuda.is_available():
        return None
    generation = torch.cuda.get_device_capability()[0]
    for name, generations in {"FA4": (10,), "FA3": (9,)}.items():
        if generation in generations and name in attention.list_flash_attention_impls():
            try:
                attention.activate_flash_attention_impl(name)
            except (ImportError, RuntimeError):  # its package is not installed, or has no kernels for this torch
                continue
            return name
    return None


def _blocked_is_faster(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.size(1) <= BLOCKED_LONGEST.get(q.dtype, 0)
