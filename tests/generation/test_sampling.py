from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nanofed.errors import ConfigError
from nanofed.generation.sampling import Sampling

LOGITS = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 2


def draws(sampling: Sampling, count: int, logits: Tensor = LOGITS) -> Tensor:
    """Draw many times at once: as many rows of the same logits, each with its own generator."""
    generators = [torch.Generator().manual_seed(n) for n in range(count)]
    return torch.tensor(sampling.draw(logits.expand(count, -1), generators))


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (5, 1.0), (None, 0.6), (20, 0.5)])
def test_draws_follow_the_distribution_that_is_left(top_k: int | None, top_p: float) -> None:
    probabilities, ids = torch.softmax(LOGITS[0].double() / 0.8, 0).sort(descending=True)
    if top_k:
        probabilities[top_k:] = 0
        probabilities /= probabilities.sum()
    count = next(n for n in range(1, 51) if probabilities[:n].sum() >= top_p - 1e-12)
    probabilities[count:] = 0
    probabilities /= probabilities.sum()
    drawn = draws(Sampling(0.8, top_k, top_p), 4000)
    for token, expected in zip(ids.tolist(), probabilities.tolist(), strict=True):
        spread = (expected * (1 - expected) / 4000) ** 0.5
        assert abs((drawn == token).double().mean().item() - expected) <= 4.5 * spread


@pytest.mark.parametrize("sampling", [Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(1e-300), Sampling(0.0, 5, 0.5)])
def test_one_of_one_and_a_tiny_temperature_are_greedy(sampling: Sampling) -> None:
    assert set(draws(sampling, 50).tolist()) == {int(LOGITS.argmax())}


def test_a_row_draws_the_same_beside_others() -> None:
    sampling = Sampling(top_k=10, top_p=0.9)
    several = torch.cat([LOGITS.flip(-1), LOGITS, LOGITS * 3])
    beside = sampling.draw(several, [torch.Generator().manual_seed(n) for n in (4, 5, 6)])
    assert sampling.draw(LOGITS, [torch.Generator().manual_seed(5)]) == beside[1:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "generate: temperature must be"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": None}, "must be numbers"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p must be positive"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
