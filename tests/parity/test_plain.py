"""nanofed's model and step against the plain path: fast paths may differ in rounding and in nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nanofed.model import GPT, GPTConfig
from nanofed.optim import Clock, MuonAdamW, Schedule, parameter_groups
from tests.parity.plain import PlainGPT, PlainOptimizer

CONFIGS = {
    "d2": GPTConfig.from_depth(2, vocab_size=300, sequence_len=96),
    "grouped": GPTConfig(sequence_len=64, vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=128),
}


@pytest.fixture(params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[GPT, PlainGPT]:
    """The same weights on both sides; none is zero, or gradients would not reach what lies behind it."""
    config = CONFIGS[request.param]
    ours = GPT(config)
    ours.init_weights(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in ours.parameters():
            if not weight.any():
                weight.normal_(std=0.05, generator=generator)
    plain = PlainGPT(config)
    plain.load_state_dict(ours.state_dict(), strict=True)
    return ours, plain


def batch(config: GPTConfig, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (3, config.sequence_len + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -1
    return tokens[:, :-1], targets


def furthest(ours: nn.Module, plain: nn.Module, of: str) -> float:
    """Return the largest relative difference (in norm) over the parameters, or over their gradients."""
    expected = dict(plain.named_parameters())
    differences = []
    for name, parameter in ours.named_parameters():
        a, b = (getattr(p, of) for p in (parameter, expected.pop(name)))
        differences.append(float((a - b).norm() / b.norm()))
    assert not expected
    return max(differences)


def test_loss_and_gradients_are_the_same(pair: tuple[GPT, PlainGPT]) -> None:
    ours, plain = pair
    inputs, targets = batch(ours.config)
    losses = [model(inputs, targets) for model in pair]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert furthest(ours, plain, "grad") < 1e-5


def test_logits_and_single_losses_are_the_same(pair: tuple[GPT, PlainGPT]) -> None:
    ours, plain = pair
    inputs, targets = batch(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs), plain(inputs), rtol=1e-5, atol=1e-5)
        singles = [model(inputs, targets, reduction="none") for model in pair]
    torch.testing.assert_close(*singles, rtol=1e-5, atol=1e-5)


def test_five_steps_end_in_the_same_weights(pair: tuple[GPT, PlainGPT]) -> None:
    ours, plain = pair
    schedule = Schedule(warmup_ratio=0.2, warmdown_ratio=0.4)
    clocks = [
        Clock(step=200, tokens=2, step_tokens=1, horizon_tokens=8) for _ in pair
    ]  # within the run, not at its begin
    fast = MuonAdamW(parameter_groups(ours), schedule=schedule, clock=clocks[0], clip=0.5, ns_dtype=torch.float32)
    slow = PlainOptimizer(plain, schedule=schedule, clock=clocks[1], clip=0.5, ns_dtype=torch.float32)
    start = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    for seed in range(5):
        inputs, targets = batch(ours.config, seed)
        for model, optimizer in ((ours, fast), (plain, slow)):
            optimizer.zero_grad()
            model(inputs, targets).backward()
            optimizer.step()
    assert clocks[0] == clocks[1]
    assert all((weight - start[name]).norm() > 1e-3 * start[name].norm() for name, weight in plain.named_parameters())
    assert furthest(ours, plain, "data") < 1e-4  # what rounding becomes over five steps of a chaotic map
