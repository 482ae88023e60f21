from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from typing import Any

import pytest
import torch

from nanofed.errors import ConfigError
from nanofed.generation.sampling import generate_ids
from nanofed.generation.text import decode_stream, generate
from nanofed.model import GPT, GPTConfig


class Bytes:
    """A tokenizer of single bytes, with bos behind them."""

    bos_token_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(GPTConfig(sequence_len=16, vocab_size=257, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.2, generator=generator)
    return model


def teach(model: GPT, following: dict[int, int]) -> GPT:
    """Make a copy that always answers token a with `following[a]`: nothing but embedding and head, chosen to match."""
    taught = GPT(model.config)
    with torch.no_grad():
        for p in taught.parameters():
            p.zero_()
        directions = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
        for row, (token, answer) in enumerate(following.items()):
            taught.transformer.wte.weight[token] = directions[row]
            taught.lm_head.weight[answer] += 10 * directions[row]
    return taught


def test_greedy_equals_reading_everything_again_each_time(model: GPT) -> None:
    prompt = [256, 10, 20, 30]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert list(generate_ids(model, prompt, max_tokens=20, temperature=0.0)) == ids[4:]


def test_a_seed_repeats_and_another_differs(model: GPT) -> None:
    first = list(generate_ids(model, [1, 2], max_tokens=30, seed=5))
    torch.rand(3)  # the global generator must not matter
    assert list(generate_ids(model, [1, 2], max_tokens=30, seed=5)) == first
    assert list(generate_ids(model, [1, 2], max_tokens=30, seed=6)) != first
    assert len(first) == 30


@pytest.mark.slow
def test_sampling_follows_the_models_distribution(model: GPT) -> None:
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([[3]]))[0, -1] / 0.5, dim=0)
    draws = torch.tensor([next(generate_ids(model, [3], max_tokens=1, temperature=0.5, seed=s)) for s in range(1500)])
    likely = expected.argsort(descending=True)[:5]
    for token in likely.tolist():
        share = (draws == token).float().mean().item()
        spread = (expected[token].item() / 1500) ** 0.5
        assert abs(share - expected[token].item()) < 4 * spread


def test_top_k_draws_among_the_likeliest_only(model: GPT) -> None:
    with torch.no_grad():
        best = set(model(torch.tensor([[3]]))[0, -1].topk(3).indices.tolist())
    draws = {next(generate_ids(model, [3], max_tokens=1, temperature=5.0, top_k=3, seed=s)) for s in range(60)}
    assert draws == best


def test_one_of_one_and_a_tiny_temperature_are_greedy(model: GPT) -> None:
    greedy = list(generate_ids(model, [3], max_tokens=10, temperature=0))
    assert list(generate_ids(model, [3], max_tokens=10, top_k=1)) == greedy
    assert list(generate_ids(model, [3], max_tokens=10, temperature=1e-300)) == greedy


def test_it_ends_before_the_stop_token(model: GPT) -> None:
    ids = list(generate_ids(model, [3], max_tokens=30, seed=1))
    stop = ids[12]
    assert list(generate_ids(model, [3], max_tokens=30, seed=1, stop_id=stop)) == ids[: ids.index(stop)]


def test_it_goes_past_the_training_length_up_to_the_tables(model: GPT) -> None:
    assert len(list(generate_ids(model, [3], max_tokens=159))) == 159
    with pytest.raises(ConfigError, match="exceed the 160 positions"):
        generate_ids(model, [3], max_tokens=160)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "prompt is empty"),
        ({"prompt_ids": [300]}, "token 300 is outside"),
        ({"prompt_ids": [-1]}, "token -1 is outside"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(model: GPT, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_ids(model, **{"prompt_ids": [1], "max_tokens": 1, **arguments})


def test_tokens_come_as_they_are_made_and_gradients_stay_on_for_the_caller(model: GPT) -> None:
    stream = generate_ids(model, [3], max_tokens=100)
    for _ in islice(stream, 3):
        assert torch.is_grad_enabled()


def test_a_compiled_model_is_not_recompiled_for_generation(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("generation went through the compiled call")

    monkeypatch.setattr(model, "_compiled_call_impl", refuse)
    assert len(list(generate_ids(model, [3], max_tokens=2))) == 2


def test_text_streams_whole_characters_and_stops_at_bos(model: GPT) -> None:
    # no byte twice, so that each names the next
    text = [ord("a"), *"é€🚀".encode(), ord("b"), 256]
    taught = teach(model, dict(pairwise(text)))
    assert list(generate(taught, Bytes(), "a", max_tokens=50, temperature=0)) == ["é", "€", "🚀", "b"]


def test_text_that_is_cut_inside_a_character_ends_in_one_replacement(model: GPT) -> None:
    text = [ord("a"), *"🚀".encode()]
    taught = teach(model, dict(pairwise(text)))
    assert "".join(generate(taught, Bytes(), "a", max_tokens=2, temperature=0)) == "�"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_decoding_in_pieces_gives_the_text(size: int) -> None:
    text = "naïve 漢字 🚀 end"
    data = text.encode()
    pieces: Iterable[bytes] = (data[i : i + size] for i in range(0, len(data), size))
    decoded = list(decode_stream(pieces))
    assert "".join(decoded) == text
    assert not any("�" in piece or not piece for piece in decoded)
