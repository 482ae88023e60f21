"""One token from logits: the likeliest, or a draw among the likely ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanofed.errors import ConfigError
from nanofed.ranges import Count, Factor, Nucleus, Seed, check_numbers


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token each time.
        top_k: Draw among this many of the likeliest, None for all.
        top_p: Draw among the fewest of the likeliest whose probabilities add up to this, after temperature and `top_k`
            (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751); 1 for all.
        seed: Of the draws.

    Raises:
        ConfigError: a number is out of its range.
    """

    temperature: Factor = 1.0
    top_k: Count | None = None
    top_p: Nucleus = 1.0
    seed: Seed = 42

    def __post_init__(self) -> None:
        if None in (self.temperature, self.top_p, self.seed):
            raise ConfigError("generate: temperature, top_p and seed must be numbers, not None")
        check_numbers(self, "generate: ")

    def draw(self, logits: Tensor, generators: list[torch.Generator]) -> list[int]:
        """Choose a token for each row of logits (B, vocab), which draws one number from its own CPU generator.

        Probabilities are formed in fp64 on the CPU, so that a seed means the same on every device as far as the logits agree.
        """
        if self.temperature == 0:
            best: list[int] = logits.argmax(-1).tolist()
            return best
        ids = None
        if self.top_k is not None or self.top_p < 1:
            logits, ids = logits.topk(min(self.top_k or logits.size(-1), logits.size(-1)))  # the greatest first
        logits = logits.cpu().double()
        # The greatest logit is taken off first: a tiny temperature must not overflow.
        weights = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).exp()
        cumulative = weights.cumsum(-1)
        total = cumulative[:, -1:]
        if self.top_p < 1:
            nucleus = (cumulative - weights < self.top_p * total).sum(-1, keepdim=True)
            total = cumulative.gather(-1, nucleus - 1)
        uniform = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
        # The first token whose interval reaches beyond the number drawn; uniform < 1 keeps it below the total.
        chosen = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
        drawn: list[int] = (chosen if ids is None else ids.cpu().gather(-1, chosen)).flatten().tolist()
        return drawn
