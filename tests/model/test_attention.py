"""The blocked kernel against SDPA, and which of them is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanofed.model import attention
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
    pairs = [(got.detach(), expected.detach())]
    pairs += zip(
        torch.autograd.grad(got, arguments, upstream),
        torch.autograd.grad(expected, exact, upstream.float()),
        strict=True,
    )
    for mine, theirs in pairs:
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


def test_no_flash_attention_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention.use_flash_attention() is None


def test_flash_attention_that_is_not_installed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert attention.use_flash_attention() is None  # torch knows FA3, its package is not there
