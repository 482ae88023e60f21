"""Attention behind one signature: faster kernels go in here, and nothing else changes."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanofed.model.blocked_attention import blocked_attention
from nanofed.model.config import GPTConfig

KERNELS = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.EFFICIENT_ATTENTION: "PyTorch's memory-efficient kernel",
    SDPBackend.MATH: "plain matrix products",
}

# The longest rows for which the blocked kernel beats SDPA's flash kernel on CPU, forward and backward (measured: fp32 on
# AVX2 1.2x at 512, 1.0x at 1,024, slower at 2,048; bf16 on AVX512-BF16 2.5x at 512 and 1.6x at 2,048).
BLOCKED_LONGEST = {torch.float32: 512, torch.bfloat16: 2048}


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, cached: bool = False) -> Tensor:
    """Let each query attend to the keys up to its own position.

    On CUDA this is SDPA, which picks cuDNN, FlashAttention or its own kernel (`attention_kernel` says which).

    Args:
        q: RMS-normed queries (B, Tq, n_head, D); they are the last Tq of the Tk positions.
        k: RMS-normed keys (B, Tk, n_kv_head, D), Tk ≥ Tq; n_kv_head divides n_head.
        v: Values, as `k`.
        mask: True where a query sees a key, (B, 1, Tq, Tk), for rows that are not equally long.
        cached: Keys and values come from a KV cache: nothing is differentiated, and SDPA is faster forward (measured on
            AMX: 3.6x to 4.4x in bf16, 1.1x to 1.7x in fp32, rows of 512 and 2,048).

    Returns:
        The mixed values (B, Tq, n_head, D), scaled dot products by 1/√D.
    """
    Tq, Tk = q.size(1), k.size(1)
    grouped = q.size(2) != k.size(2)
    if not cached and Tq == Tk and _blocked_is_faster(q):
        return blocked_attention(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is not None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    elif Tq == Tk:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif Tq == 1:
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)  # the newest token sees everything
    else:
        # is_causal would align the triangle with the first key; here the last query meets the last key.
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(diagonal=Tk - Tq)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2)


def attention_kernel(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Return the name of the kernel that SDPA runs for a training row on a CUDA device: PyTorch is asked, nothing is run.

    Its order of preference follows the GPU, cuDNN's version, the dtype and whether runs are to be deterministic.
    """
    q, k = (
        torch.empty(1, heads, config.sequence_len, config.head_dim, dtype=dtype, device=device, requires_grad=True)
        for heads in (config.n_head, config.n_kv_head)
    )
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=config.n_head != config.n_kv_head))
    if chosen == SDPBackend.FLASH_ATTENTION:  # 2 is PyTorch's own; a program may have activated a newer one
        return f"FlashAttention {(torch.nn.attention.current_flash_attention_impl() or 'FA2').removeprefix('FA')}"
    return KERNELS.get(chosen, chosen.name)


def decoding_kernels() -> AbstractContextManager[None]:
    """Have SDPA leave cuDNN's kernel alone: it makes a plan for every length of the keys, 23 to 37 ms of the host each."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _blocked_is_faster(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.size(1) <= BLOCKED_LONGEST.get(q.dtype, 0)
