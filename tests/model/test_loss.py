"""The chunked head against the whole-logits head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanofed.model import loss as head
from nanofed.model.loss import IGNORED_TARGET, LOGIT_CAP, chunk_rows, head_loss

VOCAB, WIDTH = 300, 32


def whole_loss(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    capped = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
    return F.cross_entropy(capped.flatten(0, -2), targets.flatten(), ignore_index=IGNORED_TARGET, reduction=reduction)


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(1, rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (2 * torch.randn(VOCAB, WIDTH, generator=generator)).requires_grad_()  # far into the cap
    targets = torch.randint(0, VOCAB, (1, rows), generator=generator)
    targets[0, ::5] = IGNORED_TARGET
    return hidden, weight, targets


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss / 3, of)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 16)
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 16 * VOCAB)


@pytest.mark.parametrize("rows", [2, 16, 17, 64, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_the_plain_heads(
    rows: int, reduction: str, dtype: torch.dtype, tolerance: float
) -> None:
    hidden, weight, targets = inputs(rows, dtype)
    loss = head_loss(hidden, weight, targets, reduction=reduction)
    expected = whole_loss(hidden, weight, targets, reduction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for got, want in zip(gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert got.dtype == want.dtype
        assert float((got - want).float().norm() / want.float().norm()) <= tolerance


def test_none_gives_each_position_its_loss_and_no_gradient() -> None:
    hidden, weight, targets = inputs(50)
    losses = head_loss(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(losses, whole_loss(hidden, weight, targets, "none"), rtol=1e-5, atol=1e-5)
    assert (losses[::5] == 0).all()
    assert not losses.requires_grad
    with torch.no_grad():
        assert torch.equal(head_loss(hidden, weight, targets, reduction="none"), losses)


def test_no_position_that_counts_is_nan_as_in_the_whole_head() -> None:
    hidden, weight, targets = inputs(20)
    targets.fill_(IGNORED_TARGET)
    assert head_loss(hidden, weight, targets).isnan()
    assert head_loss(hidden, weight, targets, reduction="sum") == 0


@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_saturated_logits_stay_finite(factor: float) -> None:
    hidden, weight, targets = inputs(20)
    with torch.no_grad():
        weight *= factor
    loss = head_loss(hidden, weight, targets)
    torch.testing.assert_close(loss, whole_loss(hidden, weight, targets), rtol=1e-6, atol=1e-6)
    assert all(grad.isfinite().all() for grad in gradients(loss, hidden, weight))


@pytest.mark.parametrize("rows", [1, 16, 17, 4096, 4097])
def test_chunks_are_equal_and_bounded(rows: int) -> None:
    step = chunk_rows(rows, VOCAB, "cpu")
    chunks = -(-rows // step)
    assert step <= 16
    assert chunks * step - rows < chunks  # the last is hardly shorter


def test_no_matrix_of_all_logits_is_allocated() -> None:
    hidden, weight, targets = inputs(400)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradients(head_loss(hidden, weight, targets), hidden, weight)
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert 0 < largest < 400 * VOCAB * 4
