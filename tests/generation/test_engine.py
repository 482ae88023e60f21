"""The engine generates what reading everything again for each token gives, for every row as if it were alone."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from nanofed.errors import ConfigError
from nanofed.generation.engine import Engine
from nanofed.generation.sampling import Sampling
from nanofed.model import GPT

GREEDY = Sampling(temperature=0.0)
WAYS = [GREEDY, Sampling(), Sampling(temperature=0.7, top_k=20), Sampling(top_p=0.8), Sampling(1.3, 40, 0.9, seed=7)]
PROMPTS = [[256, 10, 20, 30], [5], [256, *range(40, 60)], [7, 7]]  # of four lengths, one longer than a training row


def drawn(
    model: GPT, prompts: list[list[int]], sampling: Sampling, *, max_tokens: int, **options: Any
) -> list[list[int]]:
    """Every row's tokens."""
    rows: list[list[int]] = [[] for _ in prompts]
    for step in Engine(model).generate(prompts, sampling, max_tokens=max_tokens, **options):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def cacheless(model: GPT, prompt: list[int], sampling: Sampling, max_tokens: int) -> list[int]:
    ids, generator = list(prompt), torch.Generator().manual_seed(sampling.seed)
    with torch.no_grad():
        for _ in range(max_tokens):
            ids += sampling.draw(model(torch.tensor([ids]))[:, -1], [generator])
    return ids[len(prompt) :]


@pytest.mark.parametrize("sampling", WAYS, ids=str)
def test_rows_of_a_batch_equal_reading_everything_again_each_time(model: GPT, sampling: Sampling) -> None:
    expected = [cacheless(model, prompt, sampling, 30) for prompt in PROMPTS]
    assert drawn(model, PROMPTS, sampling, max_tokens=30) == expected
    assert [drawn(model, [prompt], sampling, max_tokens=30)[0] for prompt in PROMPTS] == expected


def test_equal_prompts_are_equal_rows(model: GPT) -> None:
    first, second, _ = drawn(model, [[1, 2], [1, 2], [3]], Sampling(), max_tokens=20)
    assert first == second


def test_a_seed_repeats_and_another_differs(model: GPT) -> None:
    first = drawn(model, [[1, 2]], Sampling(seed=5), max_tokens=30)
    torch.rand(3)  # the global generator must not matter
    assert drawn(model, [[1, 2]], Sampling(seed=5), max_tokens=30) == first
    assert drawn(model, [[1, 2]], Sampling(seed=6), max_tokens=30) != first
    assert len(first[0]) == 30


def test_a_row_ends_before_its_stop_token_and_the_others_go_on(model: GPT) -> None:
    free = drawn(model, PROMPTS, Sampling(), max_tokens=30)
    stops = {free[0][12], free[1][5]}
    ends = [next((n for n, token in enumerate(row) if token in stops), 30) for row in free]
    assert len(set(ends)) > 1
    assert drawn(model, PROMPTS, Sampling(), max_tokens=30, stop_ids=stops) == [
        row[:end] for row, end in zip(free, ends, strict=True)
    ]


def test_no_step_is_made_once_all_rows_have_ended(model: GPT) -> None:
    (token,) = drawn(model, [[3]], GREEDY, max_tokens=1)[0]
    assert list(Engine(model).generate([[3], [3]], GREEDY, max_tokens=9, stop_ids={token})) == []


def test_it_goes_past_the_training_length_up_to_the_tables(model: GPT) -> None:
    assert len(drawn(model, [[3]], Sampling(), max_tokens=159)[0]) == 159
    with pytest.raises(ConfigError, match="exceed the 160 positions"):
        Engine(model).generate([[3], [3, 4]], Sampling(), max_tokens=159)


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "message"),
    [
        ([[1], []], 1, "prompt is empty"),
        ([[1], [300]], 1, "token 300 is outside"),
        ([[-1]], 1, "token -1 is outside"),
        ([[1]], -1, "max_tokens"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(
    model: GPT, prompts: list[list[int]], max_tokens: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(model).generate(prompts, GREEDY, max_tokens=max_tokens)


def test_gradients_stay_on_for_the_caller(model: GPT) -> None:
    for _ in islice(Engine(model).generate([[3]], GREEDY, max_tokens=100), 3):
        assert torch.is_grad_enabled()


def test_weights_are_shared_in_fp32_and_cast_once_in_bf16(model: GPT) -> None:
    engine = Engine(model)
    assert engine.model.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    half = GPT(model.config, compute_dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    weights = {name: (weight.dtype, weight.clone()) for name, weight in half.named_parameters()}
    decoder = Engine(half).model
    assert {p.dtype for name, p in decoder.named_parameters() if "wte" not in name} == {torch.bfloat16}
    with torch.no_grad():
        ids = torch.arange(40)[None]
        assert torch.equal(decoder(ids), half(ids))
    assert all(half.get_parameter(name).dtype is dtype for name, (dtype, _) in weights.items())
    assert all(torch.equal(half.get_parameter(name), weight) for name, (_, weight) in weights.items())


def test_few_rows_in_bf16_are_multiplied_as_exactly_as_many(model: GPT) -> None:
    half = GPT(model.config, compute_dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.requires_grad_(False)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        exact = model(ids)
        for rows in (1, 2, 32, 50):
            assert (half(ids[:, :rows]) - exact[:, :rows]).abs().max() < 0.15 < exact.abs().max() / 10


def test_a_compiled_model_is_not_recompiled_for_generation(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("generation went through the compiled call")

    monkeypatch.setattr(model, "_compiled_call_impl", refuse)
    assert len(drawn(model, [[3]], GREEDY, max_tokens=2)[0]) == 2
