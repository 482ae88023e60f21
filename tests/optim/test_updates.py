"""AdamW and Muon against PyTorch's own, step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from nanofed.optim import Clock, MuonAdamW, Schedule, muon
from nanofed.optim.muon import orthogonalize

CONSTANT = Schedule(warmdown_ratio=0.0, muon_momentum_steps=0)
STEPS = 12


def build(params: list[nn.Parameter], ns_dtype: torch.dtype | None = None, **group: Any) -> MuonAdamW:
    clock = Clock(step_tokens=1, horizon_tokens=1000)
    return MuonAdamW([{"params": params, **group}], schedule=CONSTANT, clock=clock, clip=None, ns_dtype=ns_dtype)


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(ours: list[nn.Parameter], theirs: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for a, b in zip(ours, theirs, strict=True):
        gradient = torch.randn(a.shape, generator=generator) * 10.0 ** (step % 5 - 3)
        a.grad, b.grad = gradient.clone(), gradient.clone()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch(weight_decay: float) -> None:
    ours = parameters((50, 16), (7,), (3, 4, 5))
    theirs = copy.deepcopy(ours)
    settings: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": weight_decay}
    mine = build(ours, kind="adamw", **settings)
    reference = torch.optim.AdamW(theirs, **settings)
    for step in range(STEPS):
        set_gradients(ours, theirs, step)
        mine.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-7), f"step {step}"


def test_adamw_of_a_gradient_that_is_laid_out_otherwise() -> None:
    ours = parameters((6, 4))
    theirs = copy.deepcopy(ours)
    mine, reference = build(ours, kind="adamw", lr=0.03), build(theirs, kind="adamw", lr=0.03)
    for step in range(3):
        gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        ours[0].grad, theirs[0].grad = gradient.T, gradient.T.contiguous()
        mine.step()
        reference.step()
    assert torch.equal(ours[0], theirs[0])


def test_rate_and_momentum_recompile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    compiled = torch.compile(orthogonalize, dynamic=False, fullgraph=True, backend=counter)
    monkeypatch.setattr(muon, "_compiled", lambda: compiled)
    shapes = [(8, 12)] * 3 + [(16, 4)] * 2
    ours = parameters(*shapes)
    theirs = copy.deepcopy(ours)
    states: list[list[dict[str, Any]]] = [[{} for _ in shapes] for _ in range(2)]
    for step in range(6):
        set_gradients(ours, theirs, step)
        settings: dict[str, Any] = {"lr": 0.02 / (1 + step), "momentum": 0.85 + step / 100, "ns_steps": 5}
        for params, kept, use in ((ours, states[0], True), (theirs, states[1], False)):
            with torch.no_grad():
                grads = [p.grad for p in params if p.grad is not None]
                muon.muon_update([*params], grads, kept, ns_dtype=torch.float32, compiled=use, **settings)
    assert counter.frame_count == 2  # one a shape
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_muon_equals_torch() -> None:
    ours = parameters((32, 32), (64, 16), (16, 64), (48, 24))
    theirs = copy.deepcopy(ours)
    mine = build(ours, kind="muon", lr=0.02, ns_dtype=torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, momentum=0.95, adjust_lr_fn="original")
    for step in range(STEPS):
        set_gradients(ours, theirs, step)
        mine.step()
        reference.step()  # type: ignore[no-untyped-call]
        for a, b in zip(ours, theirs, strict=True):
            # one matrix of a shape: the same bf16 products, so only the order of sums may differ
            assert torch.allclose(a, b, rtol=0, atol=1e-6 + 4e-4 * 0.02), f"step {step} {tuple(a.shape)}"


def test_stacking_equal_shapes_changes_nothing_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = parameters(*[(24, 32)] * 5), parameters(*[(24, 32)] * 5)
    first = build(together, kind="muon", lr=0.02, ns_dtype=torch.float32)
    second = build(apart, kind="muon", lr=0.02, ns_dtype=torch.float32)
    for step in range(STEPS):
        set_gradients(together, apart, step)
        first.step()
        with monkeypatch.context() as patch:
            patch.setattr(muon, "STACK_ELEMENTS", 2 * 24 * 32)  # stacks of 2, 2 and 1
            second.step()
    for a, b in zip(together, apart, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (3, 40, 20)])
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 0.0), (torch.bfloat16, 0.05)])
def test_orthogonalize_keeps_directions_and_evens_out_sizes(
    shape: tuple[int, ...], dtype: torch.dtype, slack: float
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices, steps=5, dtype=dtype)
    assert result.dtype == dtype
    assert result.shape == matrices.shape
    inner = u.mT @ result.float() @ vh.mT
    sizes = inner.diagonal(dim1=-2, dim2=-1)
    large = s > 0.02 * torch.linalg.vector_norm(s, dim=-1, keepdim=True)  # what five steps can lift
    assert large.float().mean() > 0.9
    assert sizes[large].min() > 0.5 - slack
    assert sizes[large].max() < 1.3 + slack
    off_diagonal = inner - torch.diag_embed(sizes)
    assert off_diagonal.abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_a_zero_gradient_does_not_make_nan() -> None:
    assert not orthogonalize(torch.zeros(4, 6), steps=5, dtype=torch.float32).any()


def test_newton_schulz_runs_in_the_dtype_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def record(matrices: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
        seen.append(dtype)
        return orthogonalize(matrices, steps=steps, dtype=dtype)

    monkeypatch.setattr(muon, "orthogonalize", record)
    monkeypatch.setattr("nanofed.runtime.default_compute_dtype", lambda device: torch.float64)
    for asked in (torch.bfloat16, torch.float32, None):
        params = parameters((4, 4))
        set_gradients(params, copy.deepcopy(params), 0)
        build(params, kind="muon", lr=0.02, ns_dtype=asked).step()
    assert seen == [torch.bfloat16, torch.float32, torch.float64]
