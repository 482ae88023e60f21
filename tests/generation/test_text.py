from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch

from nanofed.errors import ConfigError
from nanofed.generation.engine import Engine
from nanofed.generation.sampling import Sampling
from nanofed.generation.text import complete, decode_stream, stream
from nanofed.model import GPT
from tests.data.corpus import Bytes

GREEDY = Sampling(temperature=0.0)


def taught(model: GPT, following: list[int]) -> Engine:
    """Make a model that always answers a token with the next one of a list: nothing but embedding and head."""
    taught = GPT(model.config)
    with torch.no_grad():
        for p in taught.parameters():
            p.zero_()
        directions = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
        for row, (token, answer) in enumerate(pairwise(following)):
            taught.transformer.wte.weight[token] = directions[row]
            taught.lm_head.weight[answer] += 10 * directions[row]
    return Engine(taught)


TEXT = [ord("a"), *"é€🚀".encode(), ord("b"), 256]  # no byte twice, so that each names the next


def test_text_streams_whole_characters_and_stops_at_bos(model: GPT) -> None:
    assert list(stream(taught(model, TEXT), Bytes(), "a", GREEDY, max_tokens=50)) == ["é", "€", "🚀", "b"]


def test_text_that_is_cut_inside_a_character_ends_in_one_replacement(model: GPT) -> None:
    engine = taught(model, [ord("a"), *"🚀".encode()])
    assert "".join(stream(engine, Bytes(), "a", GREEDY, max_tokens=2)) == "�"


def test_a_stop_ends_it_and_is_left_out(model: GPT) -> None:
    engine = taught(model, TEXT)
    assert "".join(stream(engine, Bytes(), "a", GREEDY, max_tokens=50, stop=["b", "<|bos|>"])) == "é€🚀"


def test_a_stop_of_several_tokens_is_refused(model: GPT) -> None:
    with pytest.raises(ConfigError, match=r"stop 'ab' is 2 tokens and has to be one; special tokens are <\|bos\|>"):
        stream(Engine(model), Bytes(), "a", GREEDY, stop=["ab"])


def test_many_prompts_are_completed_in_order_and_say_how_they_ended(model: GPT) -> None:
    engine = taught(model, TEXT)
    prompts = ["a", "aé", "a", "aé€", "a"]
    done = list(complete(engine, Bytes(), prompts, GREEDY, max_tokens=9, batch_size=2))
    assert [(one.prompt, one.text, one.num_tokens, one.ended) for one in done] == [
        ("a", "é€🚀", 9, "length"),
        ("aé", "€🚀b", 8, "stop"),
        ("a", "é€🚀", 9, "length"),
        ("aé€", "🚀b", 5, "stop"),
        ("a", "é€🚀", 9, "length"),
    ]


def test_all_prompts_are_checked_before_the_first_is_read(model: GPT) -> None:
    with pytest.raises(ConfigError, match=r"prompt 2 of 2 has 161 tokens.* exceed the 160 positions"):
        complete(Engine(model), Bytes(), ["a", "b" * 160], GREEDY, max_tokens=1, batch_size=1)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_decoding_in_pieces_gives_the_text(size: int) -> None:
    text = "naïve 漢字 🚀 end"
    data = text.encode()
    pieces: Iterable[bytes] = (data[i : i + size] for i in range(0, len(data), size))
    decoded = list(decode_stream(pieces))
    assert "".join(decoded) == text
    assert not any("�" in piece or not piece for piece in decoded)
