"""From one dial to every hyper-parameter: depth -> width, heads, learning rates, batch in tokens, horizon, FLOPs.

Pure functions. The defaults are nanochat's of October 2025 (karpathy/nanochat at 2e93853).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from nanofed.errors import ConfigError
from nanofed.model import GPTConfig
from nanofed.optim import Schedule
from nanofed.optim.schedule import FULL_BATCH
from nanofed.ranges import Count, Factor, Range, Share, Tokens, check_numbers

TOKENS_PER_PARAMETER = 20.0  # Chinchilla (Hoffmann et al. 2022, arXiv:2203.15556), as nanochat uses it


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, whatever drives the training.

    Attributes:
        batch_tokens: tokens in an optimizer step, over all ranks (of one client, in a federation).
        num_steps: horizon in optimizer steps of `batch_tokens`.
        horizon_tokens: horizon in tokens.
        tokens_per_parameter: horizon as a ratio; 20 when no horizon is given at all.
        horizon_flops: horizon in floating-point operations.
        embedding_lr: AdamW's rate for the embedding, scaled by (width/768)^-0.5.
        head_lr: AdamW's rate for the head, scaled by (width/768)^-0.5.
        matrix_lr: Muon's rate for the matrices, scaled by max(1, rows/columns)^0.5.
        lr_scale: a factor on `embedding_lr`, `head_lr` and `matrix_lr`; `auto` makes them fit the tokens of a step, over all
            clients of a federation, and of the run (`Schedule.scale`).
        adamw_beta2: decay of AdamW's running means of squared gradients from one step to the next: 0.95 remembers some 20
            steps; `auto` makes it fit the tokens of a step of one client (`Schedule.beta2`).
        weight_decay: decoupled decay of the AdamW groups.
        warmup_ratio: the first part of the horizon, in which the rates rise from 0.
        warmdown_ratio: the last part of the horizon, in which the rates fall linearly.
        final_lr_frac: the fraction of their peak to which the rates fall.
        clip: largest global gradient norm; 0 switches clipping off.
    """

    batch_tokens: Count = FULL_BATCH
    num_steps: Count | None = None
    horizon_tokens: Tokens | None = None
    tokens_per_parameter: Annotated[float, Range(0, 1e9, above=True)] | None = None
    horizon_flops: Annotated[float, Range(0, 1e30, above=True)] | None = None
    embedding_lr: Factor = 0.2
    head_lr: Factor = 0.004
    matrix_lr: Factor = 0.02
    lr_scale: Factor | Literal["auto"] = "auto"
    adamw_beta2: Annotated[float, Range(0, 1, below=True)] | Literal["auto"] = "auto"
    weight_decay: Factor = 0.0
    warmup_ratio: Share = 0.0
    warmdown_ratio: Share = 0.2
    final_lr_frac: Share = 0.0
    clip: Factor = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        check_numbers(self, "model.recipe.")
        given = [
            name
            for name in ("num_steps", "horizon_tokens", "tokens_per_parameter", "horizon_flops")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ConfigError(f"model.recipe gives the horizon {len(given)} times ({', '.join(given)}): keep one")
        if self.warmup_ratio + self.warmdown_ratio > 1:
            raise ConfigError("model.recipe: warmup_ratio and warmdown_ratio together are more than the whole horizon")

    @property
    def schedule(self) -> Schedule:
        """The schedule of learning rates, momentum and memory over global progress."""
        return Schedule(
            lr_scale=self.lr_scale,
            warmup_ratio=self.warmup_ratio,
            warmdown_ratio=self.warmdown_ratio,
            final_lr_frac=self.final_lr_frac,
            adamw_beta2=self.adamw_beta2,
        )

    def steps(self, config: GPTConfig) -> int:
        """Return the number of optimizer steps of `batch_tokens` to the horizon, at least 1."""
        if self.num_steps is not None:
            return self.num_steps
        if self.horizon_tokens is not None:
            tokens = float(self.horizon_tokens)
        elif self.horizon_flops is not None:
            tokens = self.horizon_flops / config.flops_per_token()
        else:
            tokens = (self.tokens_per_parameter or TOKENS_PER_PARAMETER) * config.num_parameters
        return max(1, int(tokens) // self.batch_tokens)

    def horizon(self, config: GPTConfig) -> int:
        """Return the horizon in tokens: whole steps of `batch_tokens`."""
        return self.steps(config) * self.batch_tokens


OCTOBER = Recipe()


def accumulation_steps(
    batch_tokens: int,
    *,
    device_batch_size: int,
    sequence_len: int,
    world_size: int,
    option: str = "model.recipe.batch_tokens",
    of: str = "ranks",
) -> int:
    """Return the micro-batches an optimizer step, so that few ranks train exactly as many would ("8 GPUs on 1").

    Args:
        batch_tokens: tokens of a step, over all ranks.
        device_batch_size: rows of a micro-batch.
        sequence_len: tokens of a row.
        world_size: the ranks, or others that share a step.
        option: the name of the option that `batch_tokens` is.
        of: what those are that share a step.

    Raises:
        ConfigError: the batch is no whole number of micro-batches over all ranks; names the nearest batches that are.
    """
    per_micro_batch = device_batch_size * sequence_len * world_size
    if batch_tokens % per_micro_batch == 0:
        return batch_tokens // per_micro_batch
    below = batch_tokens // per_micro_batch * per_micro_batch
    nearest = [n for n in (below, below + per_micro_batch) if n]
    raise ConfigError(
        f"{option}={batch_tokens:,} is no multiple of {world_size} {of} x {device_batch_size} rows x "
        f"{sequence_len} tokens = {per_micro_batch:,}: use {' or '.join(f'{n:,}' for n in nearest)}"
        + _other_rows(batch_tokens, device_batch_size, sequence_len * world_size)
    )


def _other_rows(batch_tokens: int, rows: int, per_row: int) -> str:
    """Name the nearest numbers of rows a micro-batch that the batch is made of, where there are any."""
    total, rest = divmod(batch_tokens, per_row)
    working = [] if rest else [n for n in range(1, total + 1) if total % n == 0]
    near = [n for n in working if n < rows][-1:] + [n for n in working if n > rows][:1]
    return f", or data.device_batch_size {' or '.join(map(str, near))}" if near else ""
