"""How learning rate, momentum and memory follow batch, horizon and progress of a run, and the clock that says where it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# Tokens of a step and of the run for which nanochat's rates are tuned: d20's.
FULL_BATCH, FULL_HORIZON = 524_288, 11_219_763_200


@dataclass(frozen=True)
class Schedule:
    """Learning rate, Muon's momentum and AdamW's memory as pure functions of where the run is; by default October nanochat's.

    Attributes:
        lr_scale: Factor on all rates of the run; `auto` makes it fit the tokens of a step and of the run (`scale`).
        warmup_ratio: Part of the run over which the rate rises linearly from 0.
        warmdown_ratio: Part of the run over which it falls linearly at the end.
        final_lr_frac: What is left of it when the run ends.
        muon_momentum_start: Momentum of Muon's first step.
        muon_momentum: Momentum after `muon_momentum_steps` steps, reached linearly.
        muon_momentum_steps: Optimizer steps that takes.
        adamw_beta2: Decay of AdamW's running means of squared gradients; `auto` makes it fit the tokens of a step (`beta2`).
    """

    lr_scale: float | Literal["auto"] = 1.0
    warmup_ratio: float = 0.0
    warmdown_ratio: float = 0.2
    final_lr_frac: float = 0.0
    muon_momentum_start: float = 0.85
    muon_momentum: float = 0.95
    muon_momentum_steps: int = 300
    adamw_beta2: float | Literal["auto"] = 0.95

    def scale(self, step_tokens: int, horizon_tokens: int) -> float:
        """Return the factor on all learning rates of a run.

        nanochat's rates are tuned for steps of 524,288 tokens on a horizon of 11.2 billion, where the factor is 1. A smaller
        batch is noisier, and wants rates that fall with its square root; the batch from which on rates need not grow any more
        rises with the square root of the horizon. So the factor is (step / b)^1/2 with b = 524,288 (horizon / 11.2 billion)^1/2,
        at most 1. It was fitted to small models from 1,024 to 16,384 tokens a step (notebooks/LOG.md).

        Args:
            step_tokens: The tokens of an optimizer step, over all participants: the mean of the clients' updates is as little
                noisy as one step on all of their batches together.
            horizon_tokens: The tokens of the whole run.
        """
        if self.lr_scale != "auto":
            return self.lr_scale
        if step_tokens >= FULL_BATCH:
            return 1.0
        enough = FULL_BATCH * math.sqrt(horizon_tokens / FULL_HORIZON)
        return min(1.0, math.sqrt(step_tokens / enough))

    def explain_scale(self, step_tokens: int, horizon_tokens: int) -> str:
        """Return the factor on all learning rates and where it comes from, in a line."""
        why = f"steps of {step_tokens:,} tokens on {horizon_tokens:,}" if self.lr_scale == "auto" else "as configured"
        return f"learning rates x {self.scale(step_tokens, horizon_tokens):.3g} ({why})"

    def beta2(self, batch_tokens: int) -> float:
        """Return the decay of AdamW's running means of squared gradients from one step to the next.

        nanochat's 0.95 remembers some 20 steps of 524,288 tokens. What has to be remembered counts in tokens rather than in
        steps (arXiv:2507.07101), so shorter steps need more of them. With `auto` their number grows as the batch falls, by its
        square root: 1 - 0.05 (batch / 524,288)^1/2, and 0.95 for larger batches. It was fitted to small models from 512 to
        4,096 tokens a step (notebooks/LOG.md).

        Args:
            batch_tokens: The tokens of an optimizer step of one participant: each has moments of its own.
        """
        if self.adamw_beta2 != "auto":
            return self.adamw_beta2
        return 1.0 - 0.05 * math.sqrt(min(1.0, batch_tokens / FULL_BATCH))

    def explain_beta2(self, batch_tokens: int) -> str:
        """Return the decay of AdamW's squared gradients and where it comes from, in a line."""
        why = f"steps of {batch_tokens:,} tokens" if self.adamw_beta2 == "auto" else "as configured"
        return f"AdamW's beta2 {self.beta2(batch_tokens):.4g} ({why})"

    def multiplier(self, tokens: float, *, step_tokens: int, horizon_tokens: int) -> float:
        """Return what every group's initial learning rate is multiplied by after `tokens` tokens of a run."""
        progress = min(1.0, tokens / horizon_tokens)
        return self.lr_multiplier(progress) * self.scale(step_tokens, horizon_tokens)

    def lr_multiplier(self, progress: float) -> float:
        """Return the part of the run's learning rates that holds at `progress` in [0, 1] of the run."""
        if progress < self.warmup_ratio:
            return progress / self.warmup_ratio
        left = 1.0 - progress
        if left >= self.warmdown_ratio:
            return 1.0
        fraction = left / self.warmdown_ratio
        return fraction + (1.0 - fraction) * self.final_lr_frac

    def momentum(self, step: int) -> float:
        """Return Muon's momentum at an optimizer step, counted from 0."""
        fraction = min(step / self.muon_momentum_steps, 1.0) if self.muon_momentum_steps else 1.0
        return (1.0 - fraction) * self.muon_momentum_start + fraction * self.muon_momentum


@dataclass(kw_only=True)
class Clock:
    """Where the run is. The optimizer moves it with every step; whoever drives the training may set it.

    `step` and `tokens` are saved with the optimizer; the others belong to the run that is being driven (participants come and
    go, a horizon may be extended), so a checkpoint does not bring them back.

    Attributes:
        step: Optimizer steps so far.
        tokens: Tokens so far, over all participants.
        step_tokens: Tokens that one optimizer step adds to `tokens`: batch tokens × participants.
        horizon_tokens: Tokens of the whole run.
        participants: Those who take a step at the same time, each with an optimizer of its own: the clients of a round.
    """

    step: int = 0
    tokens: int = 0
    step_tokens: int
    horizon_tokens: int
    participants: int = 1

    @property
    def progress(self) -> float:
        """Tokens so far over the horizon, at most 1."""
        return min(self.tokens / self.horizon_tokens, 1.0)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one participant's step."""
        return self.step_tokens // self.participants

    def advance(self) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.tokens += self.step_tokens
