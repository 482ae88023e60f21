"""The blocked kernel against SDPA, and which of them is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from nanofed.model import GPT, GPTConfig, KVCache, attention
from nanofed.model.attention import BLOCKED_LONGEST, causal_attention
from nanofed.model.blocked_attention import blocked_attention
from nanofed.model.layers import norm


def inputs(T: int, heads: int, kv_heads: int, dtype: torch.dtype, D: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    made = [torch.randn(2, T, n, D, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads)]
    return [norm(made[0]).requires_grad_(), norm(made[1]).requires_grad_(), made[2].requires_grad_()]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("T", [1, 5, 127, 128, 129, 256, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_blocked_equals_sdpa_forward_and_backward(T: int, heads: int, kv_heads: int) -> None:
    arguments = inputs(T, heads, kv_heads, torch.float32)
    got, expected = blocked_attention(*arguments), sdpa(*arguments)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(
        torch.autograd.grad(got, arguments, upstream), torch.autograd.grad(expected, arguments, upstream), strict=True
    ):
        assert float((mine - theirs).norm()) <= 1e-5 * max(float(theirs.norm()), 1.0)


def test_blocked_in_bf16_is_within_its_rounding() -> None:
    arguments = inputs(300, 4, 2, torch.bfloat16)
    exact = [a.detach().float().requires_grad_() for a in arguments]
    got, expected = blocked_attention(*arguments), sdpa(*exact)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = got.detach(), *torch.autograd.grad(got, arguments, upstream)
    truth = expected.detach(), *torch.autograd.grad(expected, exact, upstream.float())
    for mine, theirs in zip(ours, truth, strict=True):
        assert mine.dtype == torch.bfloat16
        assert float((mine.float() - theirs).norm() / theirs.norm()) < 2e-2


@pytest.mark.slow
def test_blocked_is_a_well_formed_operator() -> None:
    # torch's own checks: schema, fake tensors, autograd under compilation
    torch.library.opcheck(torch.ops.nanofed.blocked_attention.default, tuple(inputs(150, 4, 2, torch.float32)))


@pytest.mark.parametrize("dtype", BLOCKED_LONGEST)
def test_short_rows_are_blocked_and_long_ones_left_to_sdpa(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        taken.append(q.size(1))
        return blocked_attention(q, k, v)

    monkeypatch.setattr(attention, "blocked_attention", spy)
    monkeypatch.setattr(attention, "BLOCKED_LONGEST", {dtype: 130})
    for T in (130, 131):
        causal_attention(*inputs(T, 2, 2, dtype))
    q, k, v = inputs(130, 2, 2, dtype)
    causal_attention(q[:, -3:], k, v)  # a later part of the sequence
    assert taken == [130]


@pytest.mark.parametrize(
    ("chosen", "active", "name"),
    [
        (SDPBackend.CUDNN_ATTENTION, None, "cuDNN"),
        (SDPBackend.FLASH_ATTENTION, None, "FlashAttention 2"),
        (SDPBackend.FLASH_ATTENTION, "FA3", "FlashAttention 3"),
        (SDPBackend.CUDNN_ATTENTION, "FA3", "cuDNN"),  # activating one does not make SDPA prefer it
        (SDPBackend.MATH, None, "plain matrix products"),
    ],
)
def test_the_kernel_that_is_named_is_the_one_that_torch_chooses(
    chosen: SDPBackend, active: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **options: chosen.value)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active)
    config = GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=256, sequence_len=8, vocab_size=16)
    assert attention.attention_kernel(config, torch.float32, torch.device("cpu")) == name


def test_decoding_leaves_cudnn_alone_and_training_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=256, sequence_len=600, vocab_size=16)
    model = GPT(config)
    allowed: list[bool] = []
    sdpa = F.scaled_dot_product_attention

    def spy(*args: Any, **options: Any) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
        return sdpa(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    cache = KVCache(config, batch_size=1, length=603)
    ids = torch.zeros(1, 600, dtype=torch.int64)
    with torch.no_grad():
        model(ids, kv_cache=cache)  # a prompt: its length is as good as new each time
        model(ids[:, :1], kv_cache=cache)
        model(ids[:, :2], kv_cache=cache)
        assert allowed == [False, False, False]
        model(ids)
    assert allowed[3:] == [True]
