from __future__ import annotations

import math

import pytest
import torch

from nanofed.data.packing import StreamState
from nanofed.data.rows import Row
from nanofed.data.streams import DataState
from nanofed.training.losses import LossWindow, NonFiniteError, SmoothedLoss, rows_between


def place(*rows: tuple[str, int], pending: tuple[int, ...] = ()) -> DataState:
    held = tuple(Row(0, "a", row) for row in pending)
    return DataState(0, {n: StreamState(Row(0, shard, row), held) for n, (shard, row) in enumerate(rows)})


def test_the_average_is_adams_debiased_one() -> None:
    smoothed, values = SmoothedLoss(), [5.0, 3.0, 4.0, 1.0]
    assert smoothed.value is None
    for value in values:
        smoothed.add(value)
    weights = [0.9**age for age in range(len(values))][::-1]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert smoothed.value == pytest.approx(expected, rel=1e-12)


def test_a_window_gives_every_step_once_whatever_the_cut() -> None:
    losses = [torch.tensor(float(n)) for n in range(12)]
    whole, cut = LossWindow(), LossWindow()
    found = []
    for step in range(1, 7):
        for window in (whole, cut):
            window.add(step, losses[2 * step - 2 : 2 * step], torch.tensor(float(step)), None)
        if step in (1, 4):
            found += cut.read()
    found += cut.read()
    assert whole.read() == found == [(n, 2 * n - 1.5, float(n)) for n in range(1, 7)]
    assert whole.read() == []


def test_a_norm_that_is_overwritten_later_is_the_one_of_its_step() -> None:
    window, norm = LossWindow(), torch.tensor(1.0)
    for step in (1, 2):
        norm.fill_(step)
        window.add(step, [torch.tensor(0.0)], norm, None)
    assert [step.grad_norm for step in window.read()] == [1.0, 2.0]


@pytest.mark.parametrize(("loss", "norm", "what"), [(math.nan, 1.0, "loss is nan"), (2.0, math.inf, "norm is inf")])
def test_what_is_not_finite_is_named_with_its_first_step_and_rows(loss: float, norm: float, what: str) -> None:
    window = LossWindow()
    window.start(place(("a", 4), ("a", 5)))
    window.add(6, [torch.tensor(1.0)], torch.tensor(1.0), place(("a", 6), ("a", 9)))
    window.add(7, [torch.tensor(1.0), torch.tensor(loss)], torch.tensor(norm), place(("a", 8), ("a", 11)))
    window.add(8, [torch.tensor(math.nan)] * 2, torch.tensor(1.0), place(("a", 12), ("a", 13)))
    with pytest.raises(NonFiniteError, match=rf"{what} at step 7 \(its batch: rows 6 to 10 of a\)"):
        window.read()


def test_rows_of_a_batch() -> None:
    assert rows_between(None, place(("a", 3), ("a", 6))) == "rows 2 to 5 of a"
    assert rows_between(place(("a", 9), pending=(2, 7)), place(("a", 11))) == "rows 2 to 10 of a"
    assert rows_between(place(("a", 9)), place(("b", 3))) == "row 9 of a to row 2 of b"
    assert rows_between(None, None) == "data unknown"
