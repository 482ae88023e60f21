"""Token ids after a prompt, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanofed.errors import ConfigError
from nanofed.model import GPT, KVCache
from nanofed.ranges import Count, CountOrZero, Factor, Seed, check_number


def generate_ids(
    model: GPT,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 42,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Sample the tokens that follow a prompt; each is read once, through a KV cache.

    Arguments are checked at the call, not at the first token. Draws are made on the CPU, so that a seed means the same
    on every device as far as the logits agree.

    Args:
        model: A GPT with weights.
        prompt_ids: At least one token.
        max_tokens: Greatest number of tokens to yield.
        temperature: Divides the logits; 0 takes the likeliest token each time.
        top_k: Draw among this many of the likeliest, None for all.
        seed: Of the draws.
        stop_id: End before yielding this token.

    Raises:
        ConfigError: an argument is out of its range, or prompt and tokens together outreach the model's positions.
    """
    if not prompt_ids:
        raise ConfigError("generate: the prompt is empty; begin with the tokenizer's bos token")
    outside = [i for i in prompt_ids if not 0 <= i < model.config.vocab_size]
    if outside:
        raise ConfigError(
            f"generate: token {outside[0]} is outside the model's vocabulary of {model.config.vocab_size}"
        )
    for name, value, kind in (
        ("max_tokens", max_tokens, CountOrZero),
        ("temperature", temperature, Factor),
        ("top_k", top_k, Count),
        ("seed", seed, Seed),
    ):
        check_number(f"generate: {name}", value, kind)
    length = len(prompt_ids) + max_tokens
    if length > model.max_positions:
        raise ConfigError(
            f"generate: {len(prompt_ids)} prompt tokens and max_tokens {max_tokens} exceed the {model.max_positions} "
            "positions the model can read; ask for fewer"
        )
    return _generate(model, list(prompt_ids), max_tokens, temperature, top_k, seed, stop_id)


def _generate(
    model: GPT,
    unread: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    stop_id: int | None,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(
        model.config, batch_size=1, length=len(unread) + max_tokens, device=model.device, dtype=model.compute_dtype
    )
    for _ in range(max_tokens):
        with torch.no_grad():  # not around the yield, where it would reach into the caller
            # forward, not the call: a compiled training step would be recompiled for every length
            logits = model.forward(torch.tensor([unread], device=model.device), kv_cache=cache)
            token = _draw(logits[0, -1].cpu(), temperature, top_k, generator)
        if token == stop_id:
            return
        yield token
        unread = [token]


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Choose one token from logits (vocab,)."""
    if temperature == 0:
        return int(logits.argmax())
    k = logits.numel() if top_k is None else min(top_k, logits.numel())
    # the greatest logit is taken off first: a tiny temperature must not overflow
    best, ids = logits.double().topk(k)
    probabilities = torch.softmax((best - best[0]) / temperature, dim=0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
