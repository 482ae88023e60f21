from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nanofed.federated.aggregation.aggregator import PseudoGradient
from nanofed.federated.aggregation.outer import (
    DelayedNesterov,
    OuterAdam,
    OuterNesterov,
    OuterOptimizer,
    damping,
    make_outer,
    outer_strength,
)
from nanofed.federated.wire import blocks
from nanofed.federated.wire.codec import Array, Weights
from tests.federated.arrays import hash_weights, odd_weights

SHAPES = {"a": (7, 5), "b": (11,)}


def weights(seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradient(seed: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    generator = np.random.default_rng(1000 + seed)
    return {name: generator.normal(size=shape) * 1e-2 for name, shape in SHAPES.items()}


def stepped(outer: OuterOptimizer, old: Weights, g: Any, **options: float) -> dict[str, Array]:
    """Step a copy of the weights."""
    new = {name: np.array(array, order="C") for name, array in old.items()}
    outer.step(new, g, **options)
    return new


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.6), (0.7, 0.9), (1.0, 0.5), (0.3, 0.0)])
def test_it_is_torchs_nesterov_step_by_step(lr: float, momentum: float) -> None:
    ours = weights()
    outer = OuterNesterov(lr, momentum)
    theirs = {name: torch.tensor(array).double().requires_grad_() for name, array in ours.items()}
    sgd = torch.optim.SGD(theirs.values(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    for step in range(12):
        g = gradient(step)
        outer.step(ours, g)
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(g[name])
        sgd.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=0, atol=1e-6)
            assert ours[name].dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_it_is_numpys_for_any_shape_and_number_of_threads(dtype: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit in fp64; in fp32, which a lossy codec's gradient comes in, to its rounding."""
    start = {name: np.array(array, order="C") for name, array in odd_weights(3).items()}
    ends = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outer = OuterNesterov(0.7, 0.6)
        ours, theirs = ({name: array.copy() for name, array in start.items()} for _ in range(2))
        velocity = {name: np.zeros(array.shape, np.float32) for name, array in ours.items()}
        for step, fraction in enumerate((1.0, 0.25, 1.0)):
            generator = np.random.default_rng(step)
            g: PseudoGradient = {n: np.asarray(generator.normal(size=w.shape), dtype) for n, w in ours.items()}
            outer.step(ours, g, fraction=fraction)
            for name, old in theirs.items():
                wide = velocity[name] * np.float64(0.6) + g[name].astype(np.float64)
                theirs[name] = (old - 0.7 * (g[name] + fraction * 0.6 * wide)).astype(np.float32)
                velocity[name] = wide.astype(np.float32)
            momentum = {name: tensor.numpy() for name, tensor in outer.state_dict().items()}
            for got, expected in ((ours, theirs), (momentum, velocity)):
                for name in ours:
                    if dtype is np.float64:
                        assert got[name].tobytes() == expected[name].tobytes()
                    np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-6)
        ends.append([array.tobytes() for kind in (ours, momentum) for array in kind.values()])
    assert ends[0] == ends[1]


def test_a_part_of_a_round_takes_a_part_of_the_momentum() -> None:
    """Half the steps make half the gradient; of what was gathered over full rounds they get half as well."""
    start, first, second = weights(), gradient(0), gradient(1)
    for fraction in (0.0, 0.25, 1.0):
        outer = OuterNesterov(0.7, 0.6)
        moved = stepped(outer, start, first)
        new = stepped(outer, moved, second, fraction=fraction)
        for name in SHAPES:
            velocity = 0.6 * first[name] + second[name]
            expected = moved[name] - 0.7 * (second[name] + fraction * 0.6 * velocity)
            np.testing.assert_allclose(new[name], expected, rtol=0, atol=1e-6)
    plain = OuterNesterov(1.0, 0.0)
    for name, array in stepped(plain, start, first, fraction=0.1).items():
        assert (array == (start[name] - first[name]).astype(np.float32)).all(), "FedAvg has no momentum to share"


MAKERS: list[Callable[[], OuterOptimizer]] = [lambda: OuterNesterov(0.7, 0.6), OuterAdam]
made = pytest.mark.parametrize("make", MAKERS, ids=["nesterov", "adam"])


@made
def test_a_resume_goes_on_to_the_bit(make: Callable[[], OuterOptimizer]) -> None:
    outer, ours = make(), weights()
    for step in range(4):
        outer.step(ours, gradient(step))
    buffer = io.BytesIO()
    torch.save(outer.state_dict(), buffer)
    buffer.seek(0)
    resumed, theirs = make(), {name: array.copy() for name, array in ours.items()}
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(4, 8):
        outer.step(ours, gradient(step))
        resumed.step(theirs, gradient(step))
        assert all((ours[name] == theirs[name]).all() for name in SHAPES)


def test_a_loaded_momentum_is_a_copy() -> None:
    outer, ours = OuterNesterov(0.7, 0.6), weights()
    outer.step(ours, gradient(0))
    saved = {name: tensor.clone() for name, tensor in outer.state_dict().items()}
    copies = {name: tensor.clone() for name, tensor in saved.items()}
    outer.load_state_dict(saved)
    outer.step(ours, gradient(1))
    assert all(torch.equal(saved[name], copies[name]) for name in SHAPES)


def after(g: Any, make: Callable[[], OuterOptimizer] = MAKERS[0]) -> tuple[str, str, str]:
    """What a refused gradient leaves of weights and momentum, and why it was refused."""
    outer, ours = make(), weights()
    outer.step(ours, gradient(0))
    state = {name: tensor.numpy() for name, tensor in outer.state_dict().items()}
    before = hash_weights(ours), hash_weights(state)
    with pytest.raises(ValueError) as refusal:
        outer.step(ours, g)
    assert (hash_weights(ours), hash_weights(state)) == before
    outer.step(ours, gradient(1))  # and it goes on as if nothing had been
    expected, theirs = make(), weights()
    expected.step(theirs, gradient(0))
    expected.step(theirs, gradient(1))
    assert hash_weights(ours) == hash_weights(theirs)
    return (*before, str(refusal.value))


def test_other_names_and_shapes_are_refused_and_change_nothing() -> None:
    g = gradient(0)
    assert "'b'" in after({"a": g["a"]})[2]
    assert "differently" in after({"b": g["b"], "a": g["a"]})[2], "another order is another model"
    assert "b has shape (1,)" in after({"a": g["a"], "b": g["b"][:1]})[2]
    first = OuterNesterov(0.7, 0.6)
    with pytest.raises(ValueError, match="shape"):
        first.step(weights(), {"a": g["a"], "b": g["b"][:1]})
    assert first.state_dict() == {}


@pytest.mark.parametrize("make", [*MAKERS, lambda: OuterNesterov(1.0, 0.0)], ids=["nesterov", "adam", "fedavg"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39, 6e38])
@pytest.mark.parametrize("place", [0, 5, -1])
def test_what_is_not_finite_or_leaves_fp32_is_refused_and_changes_nothing(
    value: float, place: int, make: Callable[[], OuterOptimizer]
) -> None:
    g = gradient(0)
    g["b"][place] = value
    assert "the pseudo-gradient of b is not finite" in after(g, make)[2]


def test_a_step_in_fp32_overflows_nowhere_on_its_way() -> None:
    ours = {"w": np.zeros(4, np.float32)}
    with pytest.raises(ValueError, match="leave the range of fp32"):
        # g + 0.6 g is beyond it, 0.7 of that is not.
        OuterNesterov(0.7, 0.6).step(ours, {"w": np.full(4, 2.8e38, np.float32)})
    assert (ours["w"] == 0).all()


def test_the_last_element_of_many_blocks_is_looked_at_before_the_first_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ours = {"w": np.ones(3 * blocks.BLOCK + 7, np.float32)}
    g = {"w": np.ones(ours["w"].size)}
    for place in (0, blocks.BLOCK - 1, blocks.BLOCK, ours["w"].size - 1):
        bad = {"w": g["w"].copy()}
        bad["w"][place] = np.nan
        with pytest.raises(ValueError, match="not finite"):
            OuterNesterov(0.7, 0.6).step(ours, bad)
        assert (ours["w"] == 1).all()


def test_momentum_of_another_model_is_refused() -> None:
    outer, ours = OuterNesterov(0.7, 0.6), weights()
    outer.load_state_dict({"a": torch.zeros(7, 5), "c": torch.zeros(11)})
    with pytest.raises(ValueError, match="momentum names"):
        outer.step(ours, gradient(0))
    outer.load_state_dict({"a": torch.zeros(7, 5), "b": torch.zeros(12)})
    with pytest.raises(ValueError, match="momentum of b has shape"):
        outer.step(ours, gradient(0))
    assert hash_weights(ours) == hash_weights(weights())


def test_weights_that_cannot_be_stepped_in_place_are_refused() -> None:
    array = weights()["a"]
    some: list[Any] = [np.asfortranarray(array), array.astype(np.float64), np.broadcast_to(array, (7, 5))]
    for spoiled in some:
        ours = weights() | {"a": spoiled}
        with pytest.raises(ValueError, match="a cannot be stepped in place"):
            OuterNesterov().step(ours, gradient(0))


def test_adam_is_torchs_without_bias_correction() -> None:
    """With a first step in which both running means are the gradient's own, only their later decay is left."""
    ours, outer = weights(), OuterAdam(0.01, 0.9)
    start = weights()
    mean = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    square = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(6):
        g = gradient(step)
        outer.step(ours, g)
        for name in SHAPES:
            mean[name] = 0.9 * mean[name] + 0.1 * g[name]
            square[name] = 0.99 * square[name] + 0.01 * g[name] ** 2
            start[name] = (start[name] - 0.01 * mean[name] / (np.sqrt(square[name]) + 1e-6)).astype(np.float32)
            np.testing.assert_allclose(ours[name], start[name], rtol=0, atol=2e-6)


@made
def test_without_strength_a_step_is_plain_averaging(make: Callable[[], OuterOptimizer]) -> None:
    outer, ours = make(), weights()
    outer.step(ours, gradient(0))
    new = stepped(outer, ours, gradient(1), strength=0.0)
    for name, g in gradient(1).items():
        np.testing.assert_allclose(new[name], ours[name] - g, rtol=0, atol=1e-6)


def test_half_the_strength_is_half_the_way_to_averaging() -> None:
    ours = weights()
    half = stepped(OuterNesterov(0.7, 0.6), ours, gradient(0), strength=0.5)
    for name, array in stepped(OuterNesterov(0.85, 0.3), ours, gradient(0)).items():
        np.testing.assert_allclose(half[name], array, rtol=0, atol=1e-7)


def test_strength_falls_over_the_last_part_of_the_run() -> None:
    assert [outer_strength(p, 0.4) for p in (0.0, 0.6, 0.8, 1.0, 1.1)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert [outer_strength(p, 0.0) for p in (0.0, 1.0)] == [1, 1]
    assert [outer_strength(p, 1.0) for p in (0.0, 0.25, 1.0)] == [1, 0.75, 0]


@pytest.mark.parametrize(
    ("clients", "rounds", "lr", "momentum"),
    [
        (1, 40, 0.7, 0.6),
        (4, 40, 0.7, 0.6),
        (8, 40, 0.85, 0.75),
        (16, 40, 1.0, 0.9),
        (64, 40, 1.0, 0.9),
        (2, 4, 0.75, 0.5),
        (2, 1, 1.0, 0),
    ],
)
def test_automatic_rates_follow_clients_and_rounds(clients: int, rounds: float, lr: float, momentum: float) -> None:
    outer = OuterNesterov()
    outer.plan(clients, rounds)
    assert (outer.lr, outer.momentum) == pytest.approx((lr, momentum))


def test_automatic_rates_are_said_with_their_reason() -> None:
    outer = OuterNesterov()
    assert outer.plan(1, 40.0) == "outer step: learning rate 0.7, momentum 0.6, chosen for 1 client"
    assert outer.plan(2, 4.0).endswith("momentum 0.5, chosen for 2 clients and few rounds")
    pinned = OuterNesterov(momentum=0.3)
    pinned.plan(16, 40.0)
    assert (pinned.lr, pinned.momentum) == (1.0, 0.3)
    assert OuterAdam().plan(2, 40.0) == "outer step: learning rate 0.01, momentum 0.9"


def test_momentum_that_is_dropped_begins_anew() -> None:
    outer, ours = OuterNesterov(), weights()
    outer.plan(2, 40.0)
    outer.step(ours, gradient(0))
    assert outer.state_dict()
    outer.plan(2, 1.0)
    outer.step(ours, gradient(1))
    assert outer.state_dict() == {}, "plain averaging keeps nothing"


@pytest.mark.parametrize(
    ("kind", "lr", "momentum", "expected"),
    [
        ("fedavg", None, None, (OuterNesterov, 1.0, 0.0)),
        ("nesterov", None, 0.3, (OuterNesterov, 0.7, 0.3)),
        ("adam", 0.02, None, (OuterAdam, 0.02, 0.9)),
        ("auto", 0.5, 0.5, (OuterNesterov, 0.5, 0.5)),
    ],
)
def test_it_is_made_with_its_own_rates_or_those_given(kind: Any, lr: Any, momentum: Any, expected: Any) -> None:
    outer = make_outer(kind, lr, momentum)
    assert (type(outer), outer.lr, outer.momentum) == expected


def test_adam_bears_no_momentum() -> None:
    outer, ours = OuterAdam(0.01, 0.0), weights()
    outer.step(ours, gradient(0))
    for name, g in gradient(0).items():
        expected = weights()[name] - 0.01 * g / (0.1 * np.abs(g) + 1e-6)
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-5)


def test_the_state_of_another_optimizer_is_not_taken_for_its_own() -> None:
    nesterov, adam = OuterNesterov(0.7, 0.6), OuterAdam()
    for outer in (nesterov, adam):
        outer.step(weights(), gradient(0))
    for outer, other in ((OuterNesterov(0.7, 0.6), adam), (OuterAdam(), nesterov)):
        outer.load_state_dict(other.state_dict())
        assert outer.state_dict() == {}


# --- one client's update at a time


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.6), (1.0, 0.0)])
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_updates_of_all_clients_one_by_one_are_a_step_along_their_mean(
    lr: float, momentum: float, strength: float
) -> None:
    rounds, single = OuterNesterov(lr, momentum), DelayedNesterov(lr, momentum)
    together, alone = weights(), weights()
    for number in range(4):
        parts = [gradient(10 * number + client) for client in range(4)]
        mean = {name: np.mean([part[name] for part in parts], axis=0) for name in SHAPES}
        rounds.step(together, mean, strength=strength)
        for part in parts:
            single.plan(4, 1e6)
            single.step(alone, part, strength=strength)
        for name in SHAPES:
            np.testing.assert_allclose(alone[name], together[name], rtol=0, atol=1e-6)


def test_momentum_waits_until_the_parts_of_the_clients_that_are_there_make_a_whole() -> None:
    outer, current = DelayedNesterov(1.0, 0.5), weights()
    g = {name: np.ones(shape) for name, shape in SHAPES.items()}
    moved = []
    for clients in (2, 4, 4, 1):  # parts of 1/2, 1/4, 1/4: whole with the third; then another whole
        before = current["b"][0]
        outer.plan(clients, 1e6)
        outer.step(current, g)
        moved.append(float(before - current["b"][0]))
    assert moved == pytest.approx([0.5, 0.25, 0.25 + 0.5 * 1.0, 1.0 + 0.5 * (0.5 * 1.0 + 1.0)], abs=1e-6)


def test_a_saved_state_goes_on_between_two_updates() -> None:
    ends = []
    for resumed in (False, True):
        outer, current = DelayedNesterov(0.7, 0.6), weights()
        for number in range(7):
            if resumed and number == 5:
                content = io.BytesIO()
                torch.save(outer.state_dict(), content)
                content.seek(0)
                outer = DelayedNesterov(0.7, 0.6)
                outer.load_state_dict(torch.load(content, weights_only=True))
            outer.plan(3, 1e6)
            outer.step(current, gradient(number))
        ends.append(hash_weights(current))
    assert ends[0] == ends[1]


def test_a_single_update_that_is_too_large_moves_nothing() -> None:
    outer, current = DelayedNesterov(1.0, 0.5), weights()
    huge = {name: np.full(shape, 3e38) for name, shape in SHAPES.items()}
    before = hash_weights(current)
    outer.plan(1, 1e6)
    with pytest.raises(ValueError, match="would leave the range of fp32"):
        outer.step(current, huge)
    assert hash_weights(current) == before


def test_what_is_as_late_as_clients_of_one_speed_are_is_not_damped() -> None:
    assert [damping(age, 4) for age in (0, 1, 3)] == [1.0] * 3
    assert damping(15, 4) == pytest.approx(0.5), "three rounds of four merges late"
    assert damping(0, 1) == 1.0 and damping(3, 1) == pytest.approx(0.5)
    found = [damping(age, 4) for age in range(40)]
    assert found == sorted(found, reverse=True)
