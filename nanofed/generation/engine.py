"""Tokens after prompts, of many rows side by side, each read once through a KV cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from nanofed.errors import ConfigError
from nanofed.generation.sampling import Sampling
from nanofed.model import GPT, KVCache
from nanofed.model.loss import capped_logits
from nanofed.ranges import CountOrZero, check_number


class Engine:
    """Generates with a model's weights, which are cast to its compute dtype once and not at every token.

    In fp32 the weights are the model's own; otherwise matrices are copied, and later changes to the model are not seen.

    Args:
        model: A GPT with weights.
    """

    def __init__(self, model: GPT) -> None:
        with torch.device("meta"):
            self.model = GPT(model.config, compute_dtype=model.compute_dtype, rotary_dtype=model.rotary_dtype)
        embedding = "transformer.wte.weight"  # of which a token reads one row: it is cast after that
        weights = {
            name: weight.detach() if name == embedding else weight.detach().to(model.compute_dtype)
            for name, weight in model.state_dict().items()
        }
        self.model.load_state_dict(weights, assign=True)
        self.model.requires_grad_(False)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_tokens: int,
        stop_ids: Collection[int] = (),
    ) -> Iterator[list[int | None]]:
        """Yield the next token of every row, one list a step, until all rows have ended.

        A row ends at a stop token, which is not yielded, or after `max_tokens`; from then on its place holds None. Every row
        draws from a generator of its own with the same seed: what it becomes does not depend on the other rows, as far as
        the arithmetic is the same (in fp32 to rounding, in bf16 matrix products of one row are rounded otherwise than those of
        several). Arguments are checked at the call, not at the first token.

        Args:
            prompts: The rows' tokens, at least one each.
            sampling: How tokens are drawn.
            max_tokens: Greatest number of tokens to yield for a row.
            stop_ids: Tokens that end a row.

        Raises:
            ConfigError: an argument is out of its range, or prompt and tokens together outreach the model's positions.
        """
        check_number("generate: max_tokens", max_tokens, CountOrZero)
        for prompt in prompts:
            self.check(prompt, max_tokens)
        return self._generate([list(prompt) for prompt in prompts], sampling, max_tokens, frozenset(stop_ids))

    def check(self, prompt: Sequence[int], max_tokens: int, name: str = "the prompt") -> None:
        """Refuse a prompt that the model cannot read together with what is to follow it.

        Raises:
            ConfigError: it is empty, too long, or has a token that the model does not know; the error has its name.
        """
        if not prompt:
            raise ConfigError(f"generate: {name} is empty; begin with the tokenizer's bos token")
        vocab_size, positions = self.model.config.vocab_size, self.model.max_positions
        outside = [i for i in prompt if not 0 <= i < vocab_size]
        if outside:
            raise ConfigError(f"generate: token {outside[0]} is outside the model's vocabulary of {vocab_size}")
        if len(prompt) + max_tokens > positions:
            raise ConfigError(
                f"generate: {name} has {len(prompt)} tokens, and with max_tokens {max_tokens} they exceed the {positions} "
                "positions the model can read; shorten it, or ask for fewer"
            )

    def _generate(
        self, prompts: list[list[int]], sampling: Sampling, max_tokens: int, stop_ids: frozenset[int]
    ) -> Iterator[list[int | None]]:
        if not prompts or not max_tokens:
            return
        model, device = self.model, self.model.device
        generators = [torch.Generator().manual_seed(int(sampling.seed)) for _ in prompts]
        length = max(map(len, prompts)) + max_tokens
        cache = KVCache(model.config, batch_size=len(prompts), length=length, device=device, dtype=model.compute_dtype)
        ended = [False] * len(prompts)
        with torch.no_grad():  # never around a yield, where it would reach into the caller
            logits = self._read_prompts(prompts, cache)
        for count in range(1, max_tokens + 1):
            tokens = sampling.draw(logits, generators)
            ended = [done or token in stop_ids for done, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return
            yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
            if count < max_tokens:
                with torch.no_grad():
                    newest = torch.tensor(tokens, device=device)[:, None]
                    logits = self._logits(model.hidden_states(newest, cache)[:, 0])

    def _read_prompts(self, prompts: list[list[int]], cache: KVCache) -> Tensor:
        """Fill the cache with the prompts, read together, and return logits (B, vocab) of what follows each."""
        lengths = [len(prompt) for prompt in prompts]
        # Padding behind a prompt is later than all of it, so nothing of the prompt sees it.
        padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
        hidden = self.model.hidden_states(torch.tensor(padded, device=self.model.device), cache)
        cache.truncate(lengths)
        last = torch.tensor(lengths, device=hidden.device) - 1
        return self._logits(hidden[torch.arange(len(prompts), device=hidden.device), last])

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (B, vocab) of the only hidden states that a token is drawn from, (B, n_embd)."""
        return capped_logits(hidden, self.model.lm_head.weight)
