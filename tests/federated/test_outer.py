from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from nanofed.errors import ConfigError
from nanofed.federated.server.outer import OuterNesterov

SHAPES = {"a": (7, 5), "b": (11,)}


def weights(seed: int = 0) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradient(seed: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    generator = np.random.default_rng(1000 + seed)
    return {name: generator.normal(size=shape) * 1e-2 for name, shape in SHAPES.items()}


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.6), (0.7, 0.9), (1.0, 0.5), (0.3, 0.0)])
def test_it_is_torchs_nesterov_step_by_step(lr: float, momentum: float) -> None:
    ours = weights()
    outer = OuterNesterov(lr, momentum)
    theirs = {name: torch.from_numpy(array).double().requires_grad_() for name, array in ours.items()}
    sgd = torch.optim.SGD(theirs.values(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    for step in range(12):
        g = gradient(step)
        ours = outer.step(ours, g)
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(g[name])
        sgd.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=0, atol=1e-6)
            assert ours[name].dtype == np.float32


def test_a_part_of_a_round_takes_a_part_of_the_momentum() -> None:
    """Half the steps make half the gradient; of what was gathered over full rounds they get half as well."""
    start, first, second = weights(), gradient(0), gradient(1)
    for fraction in (0.0, 0.25, 1.0):
        outer = OuterNesterov(0.7, 0.6)
        moved = outer.step(start, first)
        new = outer.step(moved, second, fraction=fraction)
        for name in SHAPES:
            velocity = 0.6 * first[name] + second[name]
            expected = moved[name] - 0.7 * (second[name] + fraction * 0.6 * velocity)
            np.testing.assert_allclose(new[name], expected, rtol=0, atol=1e-6)
    plain = OuterNesterov(1.0, 0.0)
    for name, array in plain.step(start, first, fraction=0.1).items():
        assert (array == (start[name] - first[name]).astype(np.float32)).all(), "FedAvg has no momentum to share"


def test_a_resume_goes_on_to_the_bit() -> None:
    outer, ours = OuterNesterov(0.7, 0.6), weights()
    for step in range(4):
        ours = outer.step(ours, gradient(step))
    buffer = io.BytesIO()
    torch.save(outer.state_dict(), buffer)
    buffer.seek(0)
    resumed, theirs = OuterNesterov(0.7, 0.6), dict(ours)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(4, 8):
        ours, theirs = outer.step(ours, gradient(step)), resumed.step(theirs, gradient(step))
        assert all((ours[name] == theirs[name]).all() for name in SHAPES)


def test_saved_momentum_is_not_changed_by_later_steps() -> None:
    outer = OuterNesterov(0.7, 0.6)
    ours = outer.step(weights(), gradient(0))
    saved = outer.state_dict()
    copies = {name: tensor.clone() for name, tensor in saved.items()}
    outer.step(ours, gradient(1))
    assert all(torch.equal(saved[name], copies[name]) for name in SHAPES)


def test_other_names_and_shapes_are_refused_and_change_nothing() -> None:
    outer, ours = OuterNesterov(0.7, 0.6), weights()
    g = gradient(0)
    with pytest.raises(ValueError, match="'b'"):
        outer.step(ours, {"a": g["a"]})
    with pytest.raises(ValueError, match=r"b has shape \(1,\)"):
        outer.step(ours, {"a": g["a"], "b": g["b"][:1]})
    new = outer.step(ours, g)
    expected = OuterNesterov(0.7, 0.6).step(ours, g)
    assert all((new[name] == expected[name]).all() for name in SHAPES), "a refused gradient leaves no momentum behind"


@pytest.mark.parametrize(("lr", "momentum"), [(0.0, 0.5), (-1.0, 0.5), (1.0, 1.0), (1.0, -0.1), (float("nan"), 0.5)])
def test_rates_that_make_no_sense_are_refused(lr: float, momentum: float) -> None:
    with pytest.raises(ConfigError, match="outer_lr must be positive"):
        OuterNesterov(lr, momentum)
