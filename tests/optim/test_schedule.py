from __future__ import annotations

import pytest

from nanofed.optim import Clock, Schedule

OCTOBER = Schedule()
WARMED = Schedule(warmup_ratio=0.1, warmdown_ratio=0.5, final_lr_frac=0.2)
FLAT = Schedule(warmdown_ratio=0.0)


@pytest.mark.parametrize(
    ("schedule", "multipliers"),
    [
        (OCTOBER, {0.0: 1.0, 0.5: 1.0, 0.8: 1.0, 0.85: 0.75, 0.9: 0.5, 0.99: 0.05, 1.0: 0.0}),
        (WARMED, {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.5: 1.0, 0.75: 0.6, 1.0: 0.2}),
        (FLAT, {1.0: 1.0}),
    ],
    ids=["October's", "warm-up and a floor", "no warm-down"],
)
def test_the_rate_is_a_function_of_progress(schedule: Schedule, multipliers: dict[float, float]) -> None:
    assert {p: schedule.lr_multiplier(p) for p in multipliers} == pytest.approx(multipliers)


def test_muon_momentum_rises_over_300_steps_or_has_no_ramp() -> None:
    momenta = {0: 0.85, 150: 0.90, 300: 0.95, 10_000: 0.95}
    assert {step: OCTOBER.momentum(step) for step in momenta} == pytest.approx(momenta)
    assert Schedule(muon_momentum_steps=0).momentum(0) == 0.95


def test_clock_counts_tokens_of_all_and_stops_at_the_horizon() -> None:
    clock = Clock(step_tokens=30, horizon_tokens=100)
    seen = []
    for _ in range(5):
        seen.append(clock.progress)
        clock.advance()
    assert seen == [0.0, 0.3, 0.6, 0.9, 1.0]
    assert (clock.step, clock.tokens) == (5, 150)


@pytest.mark.parametrize(
    ("step_tokens", "horizon", "scale"),
    [
        (524_288, 11_219_763_200, 1.0),  # d20
        (524_288, 37_580_963_840, 1.0),  # d32
        (1_048_576, 37_580_963_840, 1.0),
        (4_096, 819_200, 0.956),  # tiny
        (4_096, 4_915_200, 0.611),
        (1_024, 819_200, 0.478),
        (16_384, 819_200, 1.0),
        (32_768, 734_003_200, 0.494),  # d4
    ],
)
def test_rates_follow_the_square_root_of_the_batch_over_what_the_horizon_asks_for(
    step_tokens: int, horizon: int, scale: float
) -> None:
    automatic = Schedule(lr_scale="auto", warmdown_ratio=0.5)
    assert automatic.scale(step_tokens, horizon) == pytest.approx(scale, abs=0.001)
    run = {"step_tokens": step_tokens, "horizon_tokens": horizon}
    assert automatic.multiplier(0.75 * horizon, **run) == pytest.approx(0.5 * scale, abs=0.001)
    assert automatic.multiplier(2.0 * horizon, **run) == 0, "beyond the horizon as at its end"
    assert f"steps of {step_tokens:,} tokens on {horizon:,}" in automatic.explain_scale(**run)
    assert Schedule(lr_scale=0.3).scale(step_tokens, horizon) == 0.3
    assert Schedule(lr_scale=0.3).explain_scale(**run) == "learning rates x 0.3 (as configured)"


@pytest.mark.parametrize(
    ("batch_tokens", "beta2"), [(1_048_576, 0.95), (524_288, 0.95), (131_072, 0.975), (4_096, 0.99558), (512, 0.99844)]
)
def test_short_steps_are_remembered_longer(batch_tokens: int, beta2: float) -> None:
    automatic = Schedule(adamw_beta2="auto")
    assert automatic.beta2(batch_tokens) == pytest.approx(beta2, abs=1e-5)
    assert automatic.explain_beta2(batch_tokens) == f"AdamW's beta2 {beta2:.4g} (steps of {batch_tokens:,} tokens)"
    assert Schedule().beta2(batch_tokens) == 0.95
    assert Schedule(adamw_beta2=0.9).explain_beta2(batch_tokens) == "AdamW's beta2 0.9 (as configured)"
