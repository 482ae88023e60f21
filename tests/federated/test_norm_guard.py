"""How long an update may be: of one client, beside the others of its round, and by what the recipe's steps can move."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanofed.federated.aggregation.norm_guard import LARGEST, Length, NormGuard, Steps, UnusualNorm
from nanofed.federated.server.scheduling import steps_taken
from nanofed.optim import Movement, Schedule
from nanofed.training.module import GPTModule
from nanofed.training.recipe import Recipe
from tests.federated.replies import instructions

ONE_STEP = Steps(1.0, 1.0, 0.95)
MOVEMENTS = {"matrix": Movement("muon", "matrices", 1.0, 0.0), "head": Movement("adamw", "head", 1.0, 0.0)}


def moved(matrix: float, head: float = 0.1) -> Length:
    """An update that is so long in each group."""
    return Length(math.hypot(matrix, head), {"matrices": matrix, "head": head})


class TestNorms:
    def guard(self, action: Any = "clip", ratio: float | None = 5.0) -> NormGuard:
        return NormGuard(ratio, action, MOVEMENTS)

    def scale(self, guard: NormGuard, client: str, here: dict[str, Length]) -> float:
        return guard.scale(here[client], here, lambda: 1e9)

    def test_a_length_is_of_the_steps_that_were_taken(self) -> None:
        told = instructions(clock_tokens=0, batch_tokens=64, participants=2, horizon_tokens=64 * 2 * 10)
        steps = steps_taken(Schedule(warmdown_ratio=0.5), told, 10)
        rates = [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
        assert steps.linear == pytest.approx(sum(rates)) and steps.quadrature == pytest.approx(
            math.sqrt(sum(rate**2 for rate in rates))
        )
        many = steps_taken(Schedule(warmdown_ratio=0.5), replace(told, horizon_tokens=64 * 2 * 10_000), 10_000)
        assert many.linear == pytest.approx(7_500, rel=1e-3)
        length = self.guard().measure([4.0, 0.0], Steps(16.0, 4.0, 0.95))
        assert length.norm == 4.0 and length.groups == {"matrices": pytest.approx(0.5), "head": 0.0}

    def test_what_no_steps_of_the_recipe_can_move_is_refused_whatever_the_action(self) -> None:
        self.guard().measure([1.25 * 3, 1.6 * 3], Steps(3.0, 2.0, 0.95))
        for norms, name in (([4.2, 0.0], "matrix"), ([1.0, 5.3], "head")):
            with pytest.raises(UnusualNorm, match=f"of {name} is .* more than the limit of .* no steps") as refused:
                self.guard().measure(norms, Steps(3.0, 2.0, 0.95))
            assert refused.value.kind == "large_norm"

    def test_weight_decay_moves_as_well(self) -> None:
        guard = NormGuard(5.0, "clip", {"head": Movement("adamw", "head", 1.0, 0.1)})
        assert guard.measure([2.6], ONE_STEP, lambda name: 10.0).norm == 2.6

    @pytest.mark.parametrize("norms", [[0.0, 0.0], [1e-9, 0.0], [0.049, 0.049]])
    def test_an_update_that_has_hardly_moved_is_refused_by_name(self, norms: list[float]) -> None:
        with pytest.raises(UnusualNorm, match="it has hardly trained") as refused:
            self.guard().measure(norms, ONE_STEP)
        assert refused.value.kind == "small_norm"

    def test_steps_at_a_rate_of_zero_move_nothing(self) -> None:
        assert self.guard().measure([0.0, 0.0], Steps(0.0, 0.0, 0.95)).norm == 0.0
        with pytest.raises(UnusualNorm, match="no steps of the recipe exceed"):
            self.guard().measure([1e-9, 0.0], Steps(0.0, 0.0, 0.95))

    def test_what_honest_sites_send_is_never_suspicious(self) -> None:
        """The first step of a head of zeros moves only the head; lengths are those measured of 1 and of 16 steps."""
        guard = self.guard()
        for honest in (moved(0.0, 1.0), moved(0.16, 0.9), moved(0.5, 0.5), moved(0.75, 0.02)):
            assert guard.is_unsuspicious(honest)
            assert self.scale(guard, "a", {"a": honest, "b": moved(0.06, 0.001)}) == 1.0

    def test_a_site_has_one_vote_however_often_it_was_merged(self) -> None:
        guard = self.guard()
        for _ in range(50):
            guard.accept({"small": (moved(0.06, 0.001), 1.0)})
        for _ in range(20):
            guard.accept({name: (moved(0.9), 1.0) for name in ("a", "b")})
        assert self.scale(guard, "a", {"a": moved(4.4)}) == 1.0
        assert self.scale(guard, "a", {"a": moved(9.0)}) == pytest.approx(0.5, rel=0.01)

    def test_small_updates_bring_the_limit_below_no_honest_one(self) -> None:
        guard = self.guard()
        for _ in range(200):
            guard.accept({"small": (moved(0.05, 0.0), 1.0)})
        assert self.scale(guard, "honest", {"honest": moved(0.8, 0.9)}) == 1.0

    def test_who_joins_late_moves_its_head_as_its_steps_allow(self) -> None:
        """The second moments of the others remember the first gradients, its own do not: measured of 7 steps."""
        guard = self.guard("reject")
        for _ in range(20):
            guard.accept({name: (moved(0.74, 0.05), 1.0) for name in ("a", "b")})
        late = moved(0.8, 1.24)
        assert guard.is_unsuspicious(late)
        assert self.scale(guard, "late", {"a": moved(0.76, 0.05), "late": late}) == 1.0

    @pytest.mark.parametrize("sites", [2, 5])
    def test_one_site_at_the_limit_does_not_drive_it(self, sites: int) -> None:
        guard, limits = self.guard(), []
        for _ in range(200):
            here = {f"{n}": moved(0.6) for n in range(sites - 1)}
            tried = {**here, "ramp": moved(1e6)}
            limits.append(1e6 * self.scale(guard, "ramp", tried))
            scale = 0.999 * limits[-1] / 1e6
            guard.accept({**{name: (length, 1.0) for name, length in here.items()}, "ramp": (moved(1e6), scale)})
        assert max(limits) <= 5 * 0.6 * 1.001

    def test_the_limit_grows_by_a_quarter_a_round_at_most(self) -> None:
        guard, limit = self.guard(), 0.0
        for number in range(12):
            new = 1e6 * self.scale(guard, "a", {"a": moved(1e6)}) if number else 5 * 0.6
            assert number < 2 or limit < new <= 1.251 * limit
            limit = new
            guard.accept({"a": (moved(0.6 if number < 1 else 1e6), 1.0)})

    def test_who_was_refused_comes_back(self) -> None:
        guard = self.guard("reject")
        for _ in range(10):
            guard.accept({"a": (moved(0.6), 1.0), "b": (moved(0.6), 1.0)})
        for _ in range(50):
            with pytest.raises(UnusualNorm, match=r"group matrices 1\.67 times the limit, which is 5 times") as refused:
                self.scale(guard, "b", {"a": moved(0.6), "b": moved(5.0)})
            assert refused.value.kind == "large_norm"
        assert self.scale(guard, "b", {"a": moved(0.6), "b": moved(0.7)}) == 1.0

    def test_the_others_of_the_round_count_from_the_first_one_on(self) -> None:
        here = {"a": moved(2.0), "b": moved(2.2), "c": moved(40.0)}
        guard = self.guard()
        assert not guard.is_unsuspicious(here["c"]) and self.scale(guard, "c", here) == pytest.approx(5 * 2.2 / 40)

    def test_ten_times_the_weights_is_too_long_for_anything(self) -> None:
        with pytest.raises(UnusualNorm, match="10 times the weights' norm"):
            self.guard().scale(moved(2.0), {"a": moved(2.0)}, lambda: 0.1)

    def test_without_a_ratio_only_what_the_outer_step_cannot_bear_is_too_large(self) -> None:
        guard = self.guard(ratio=None)
        assert guard.is_unsuspicious(guard.measure([0.0, 0.0], ONE_STEP))
        assert guard.scale(guard.measure([1e14, 0.0], ONE_STEP), {}, lambda: 1.0) == 1.0
        huge = guard.measure([1e31, 0.0], ONE_STEP)
        assert not guard.is_unsuspicious(huge) and guard.scale(huge, {}, lambda: 1.0) == pytest.approx(LARGEST / 1e31)

    def test_it_is_saved(self) -> None:
        guard, other = self.guard(), self.guard()
        for _ in range(3):
            guard.accept({"a": (moved(0.9), 1.0)})
        other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        assert other.state_dict() == guard.state_dict()
        assert self.scale(other, "a", {"a": moved(9.0)}) == self.scale(guard, "a", {"a": moved(9.0)})
        other.load_state_dict({"norms": [1.0], "rounds": 1})  # of an older nanofed
        assert other.state_dict() == self.guard().state_dict()


@pytest.mark.parametrize("batch_tokens", [524_288, 512])
def test_the_recipe_says_how_far_a_step_moves_every_weight(batch_tokens: int) -> None:
    """A real optimizer on gradients of noise: no step is longer, and Muon's are as long as they say."""
    recipe = Recipe(num_steps=100, weight_decay=0.1, batch_tokens=batch_tokens, lr_scale=1.0)
    beta2 = recipe.schedule.beta2(batch_tokens)
    module = GPTModule(depth=1, sequence_len=32, vocab_size=64, compile=False, recipe=recipe)
    module.configure_model()
    optimizer, told = module.configure_optimizers(), module.movements()
    generator = torch.Generator().manual_seed(0)
    assert list(told) == list(module.gpt.state_dict())
    for number in range(12):
        before = {name: p.detach().clone() for name, p in module.gpt.named_parameters()}
        for parameter in module.gpt.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * (1000.0 if number % 4 == 3 else 1e-3)
        optimizer.step()
        for name, parameter in module.gpt.named_parameters():
            length, step = float((parameter.detach() - before[name]).norm()), told[name]
            assert length <= step.most(beta2) + step.decay * float(before[name].norm()), name
            assert step.kind == "adamw" or length > 0.5 * step.step, name
