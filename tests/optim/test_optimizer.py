from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanofed.errors import ConfigError
from nanofed.model import GPT, GPTConfig
from nanofed.optim import Clock, MuonAdamW, Schedule, parameter_groups

CONFIG = GPTConfig(sequence_len=16, vocab_size=61, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


def build(horizon_steps: int = 20, clip: float | None = 1.0, seed: int = 0) -> tuple[GPT, MuonAdamW]:
    model = GPT(CONFIG)
    model.init_weights(seed)
    clock = Clock(step_tokens=32, horizon_tokens=32 * horizon_steps)
    schedule = Schedule(muon_momentum_steps=10)
    groups = parameter_groups(model, weight_decay=0.01)
    return model, MuonAdamW(groups, schedule=schedule, clock=clock, clip=clip, ns_dtype=torch.float32)


def batch(step: int) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (2, 17), generator=torch.Generator().manual_seed(step))


def train(model: GPT, optimizer: MuonAdamW, steps: range) -> None:
    for step in steps:
        rows = batch(step)
        optimizer.zero_grad()
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_learns() -> None:
    model, optimizer = build(horizon_steps=30)
    rows = batch(0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4
    assert losses[-1] < 0.5


def test_rate_and_momentum_come_from_the_clock_before_the_step() -> None:
    model, optimizer = build(horizon_steps=10)
    initial = [g["lr"] for g in optimizer.param_groups]
    fractions = []
    for step in range(12):
        assert optimizer.clock.step == step
        train(model, optimizer, range(step, step + 1))
        fractions.append({g["lr"] / lr for g, lr in zip(optimizer.param_groups, initial, strict=True)})
    assert all(len(f) == 1 for f in fractions)
    assert [f.pop() for f in fractions] == pytest.approx([1.0] * 9 + [0.5, 0.0, 0.0])
    assert (optimizer.clock.step, optimizer.clock.tokens) == (12, 12 * 32)


def test_at_the_end_of_the_horizon_nothing_moves() -> None:
    model, optimizer = build()
    optimizer.clock.tokens = optimizer.clock.horizon_tokens
    before = copy.deepcopy(model)
    train(model, optimizer, range(1))
    assert equal(model, before)


def test_momentum_follows_the_step() -> None:
    model, optimizer = build()
    matrix = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    gradient = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0)) * 1e-4  # below the clip
    expected = torch.zeros_like(matrix)
    for step in range(12):
        matrix.grad = gradient.clone()
        optimizer.step()
        expected.lerp_(gradient, 1 - optimizer.schedule.momentum(step))
        assert torch.allclose(optimizer.state[matrix]["momentum_buffer"], expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_clipping_equals_torchs_over_all_groups(scale: float) -> None:
    model, optimizer = build()
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=generator) * scale
        q.grad = p.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    optimizer.step()
    assert optimizer.grad_norm is not None
    # the groups' order differs from the model's, and a norm of norms rounds by order
    assert torch.allclose(optimizer.grad_norm, expected, rtol=1e-6)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=0)


def test_without_a_clip_gradients_stay_and_the_norm_is_known() -> None:
    model, optimizer = build(clip=None)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(CONFIG.num_parameters**0.5)


def test_parameters_without_gradient_are_left_alone() -> None:
    model, optimizer = build()
    head = model.lm_head.weight
    head.grad = torch.ones_like(head)
    before = copy.deepcopy(model)
    optimizer.step()
    old = dict(before.named_parameters())
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, old[name])]
    assert moved == ["lm_head.weight"]
    assert list(optimizer.state) == [head]


def test_the_closure_runs_first_with_gradients_and_its_loss_comes_back() -> None:
    model, optimizer = build()
    plain, reference = build()
    rows = batch(0)

    def closure() -> float:
        assert torch.is_grad_enabled()
        assert optimizer.clock.step == 0
        optimizer.zero_grad()
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        return loss.item()  # type: ignore[no-any-return]

    loss = optimizer.step(closure)
    train(plain, reference, range(1))
    assert loss == pytest.approx(4.11, abs=0.01)
    assert equal(model, plain)


def test_resume_is_bitwise_through_a_weights_only_file() -> None:
    straight, optimizer = build()
    train(straight, optimizer, range(12))

    model, first = build()
    train(model, first, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed, second = build(seed=1)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert (second.clock.step, second.clock.tokens) == (5, 160)
    train(resumed, second, range(5, 12))
    assert equal(straight, resumed)
    assert_same(optimizer.state_dict(), second.state_dict())


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    else:
        assert a == b


def test_the_state_dict_has_torchs_keys_and_the_clock() -> None:
    model, optimizer = build()
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "clock"}
    assert state["clock"] == {"step": 1, "tokens": 32}
    assert set(state["state"]) == set(range(len(list(model.parameters()))))


def test_a_load_leaves_the_runs_own_token_counts() -> None:
    _, first = build(horizon_steps=20)
    _, second = build(horizon_steps=40)
    second.clock.step_tokens = 64
    second.load_state_dict(first.state_dict())
    assert (second.clock.step_tokens, second.clock.horizon_tokens) == (64, 40 * 32)


def test_a_load_leaves_the_runs_own_rates_and_decays() -> None:
    model, first = build()
    train(model, first, range(2))
    other, second = build()
    own = {"initial_lr": 0.125, "weight_decay": 0.25}
    second.schedule = Schedule(adamw_beta2=0.999)
    for group in second.param_groups:
        group.update({name: value for name, value in own.items() if name in group})
    second.load_state_dict(first.state_dict())
    assert all(group[name] == own[name] for group in second.param_groups for name in own.keys() & group.keys())
    assert second.state_dict()["state"].keys() == first.state_dict()["state"].keys() != set()
    train(other, second, range(2, 3))
    assert all(group["betas"] == (0.8, 0.999) for group in second.param_groups if group["kind"] == "adamw")


def test_a_foreign_state_dict_changes_nothing() -> None:
    model, optimizer = build()
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    foreign = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(KeyError, match="clock"):
        optimizer.load_state_dict(foreign)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**foreign, "clock": {"step": 9, "tokens": 9}})
    assert_same(before, optimizer.state_dict())


def test_a_copy_goes_on_alike_and_apart() -> None:
    model, optimizer = build()
    train(model, optimizer, range(3))
    twin, second = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(3, 6))
    assert second.clock.step == 3
    train(twin, second, range(3, 6))
    assert equal(model, twin)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": 0.1}, "kind must be one of"),
        ({"lr": 0.1, "kind": "sgd"}, "kind must be one of"),
        ({"kind": "adamw"}, "needs an lr"),
        ({"kind": "adamw", "lr": -1.0}, "needs an lr"),
        ({"kind": "adamw", "lr": float("nan")}, "needs an lr"),
        ({"kind": "muon", "lr": 0.1}, "matrices only"),
    ],
)
def test_wrong_groups_are_refused(group: dict[str, Any], message: str) -> None:
    clock = Clock(step_tokens=1, horizon_tokens=1)
    with pytest.raises(ConfigError, match=message):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], **group}], schedule=Schedule(), clock=clock)


def test_a_clip_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="clip"):
        build(clip=0.0)


def test_the_memory_follows_a_participant_s_batch_and_keeps_the_corrected_moments() -> None:
    """Of clients that come and go, each one's share of a batch changes; the moments go on as if they had been so all along."""
    model, optimizer = build()
    optimizer.schedule = Schedule(adamw_beta2="auto", warmdown_ratio=0.0)
    optimizer.clock.step_tokens, optimizer.clock.participants = 4_096, 1
    train(model, optimizer, range(3))
    group = optimizer.param_groups[0]
    (state,) = (optimizer.state[param] for param in group["params"])
    beta2 = group["betas"][1]
    assert beta2 == optimizer.schedule.beta2(4_096)
    corrected = state["exp_avg_sq"] / (1 - beta2**3)
    optimizer.clock.participants = 4
    optimizer.zero_grad()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    longer = group["betas"][1]
    assert longer == optimizer.schedule.beta2(1_024) > beta2
    torch.testing.assert_close(state["exp_avg_sq"] / longer / (1 - longer**3), corrected)

    saved, (other, resumed) = copy.deepcopy(optimizer.state_dict()), build()
    resumed.load_state_dict(copy.deepcopy(saved))
    assert resumed.param_groups[0]["betas"][1] == longer, "what its moments were made with"
    for param in other.parameters():
        param.grad = torch.zeros_like(param)
    resumed.step()
    assert resumed.param_groups[0]["betas"][1] == 0.95, "its config's"
    (loaded,) = (resumed.state[param] for param in resumed.param_groups[0]["params"])
    before = saved["state"][0]["exp_avg_sq"] / (1 - longer**4)
    torch.testing.assert_close(loaded["exp_avg_sq"] / 0.95 / (1 - 0.95**4), before)


def test_rates_follow_the_batches_and_the_horizon_of_the_clock() -> None:
    """A round has as many participants as are there, and a run may go on to another horizon: no group has to be touched."""
    _, optimizer = build()
    optimizer.schedule = Schedule(lr_scale="auto", warmdown_ratio=0.0)
    rates = []
    for step_tokens, horizon_tokens in ((4_096, 819_200), (1_024, 819_200), (4_096, 16 * 819_200)):
        optimizer.clock.step_tokens, optimizer.clock.horizon_tokens = step_tokens, horizon_tokens
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert [rate / rates[0] for rate in rates] == pytest.approx([1.0, 0.5, 0.5])
