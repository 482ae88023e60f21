"""Whether a run fits into the memory there is, said before it starts, and what would fit if it does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from lightning import Trainer

from nanofed import runtime
from nanofed.data.datamodule import TokenDataModule
from nanofed.errors import ConfigError
from nanofed.model import GPTConfig
from nanofed.training.available import available_bytes
from nanofed.training.memory import MemoryEstimate, estimate_memory, format_bytes
from nanofed.training.module import DTYPES, GPTModule
from nanofed.training.strategy import ShardedStrategy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where an optimizer step is computed.

    Attributes:
        device: of this rank.
        ranks: that share a step.
        local_ranks: of them on this machine: on CPU they share its memory.
        sharded: whether the optimizer's states are divided over the ranks.
        clients: of a federation that take turns here, each with an optimizer state of its own.
        forks: whether ranks will be forked from this process (in a notebook), which must not have touched CUDA then.
    """

    device: torch.device
    ranks: int = 1
    local_ranks: int = 1
    sharded: bool = False
    clients: int = 1
    forks: bool = False

    @classmethod
    def of(cls, trainer: Trainer) -> Place:
        """Return where a Trainer computes."""
        ranks = trainer.world_size
        sharded = ranks > 1 and isinstance(trainer.strategy, ShardedStrategy)
        launcher = trainer.strategy.launcher
        forks = launcher is not None and launcher.is_interactive_compatible
        return cls(trainer.strategy.root_device, ranks, min(ranks, trainer.num_devices), sharded, forks=forks)


@dataclass(frozen=True)
class Setting:
    """What the memory of a run on a place follows from."""

    config: GPTConfig
    device_batch_size: int
    batch_tokens: int
    compute_dtype: torch.dtype
    compiled: bool
    place: Place

    def estimate(self) -> MemoryEstimate:
        """Return what it needs on each device."""
        return estimate_memory(
            self.config,
            device_batch_size=self.device_batch_size,
            compute_dtype=self.compute_dtype,
            compiled=self.compiled,
            device=self.place.device.type,
            accumulation=self.batch_tokens // self._tokens_at_once,
            ranks=self.place.ranks,
            sharded=self.place.sharded,
            clients=self.place.clients,
        )

    def divides(self) -> bool:
        """Tell whether the batch is a whole number of micro-batches."""
        return self.batch_tokens % self._tokens_at_once == 0

    @property
    def _tokens_at_once(self) -> int:
        return self.device_batch_size * self.config.sequence_len * self.place.ranks


def check_memory(module: GPTModule, data: TokenDataModule, place: Place, *, batch_tokens: int, force: bool) -> None:
    """Refuse a run that needs more memory than its device has left, naming what the memory is for and what would fit.

    Raises:
        ConfigError: it does not fit, and `force` is not given.
    """
    if place.forks and place.device.type == "cuda":
        return
    available = available_bytes(place.device, sharing=place.local_ranks)
    if available is None:
        return
    setting = Setting(
        config=module.config,
        device_batch_size=data.device_batch_size,
        batch_tokens=batch_tokens,
        compute_dtype=DTYPES.get(module.compute_dtype, runtime.default_compute_dtype(place.device)),
        compiled=_compiles(module.compile_model, place.device),
        place=place,
    )
    estimate = setting.estimate()
    if estimate.peak <= available:
        return
    each = f" on each of {place.local_ranks} ranks" if place.local_ranks > 1 else ""
    needs = (
        f"the run needs about {format_bytes(estimate.peak)} of memory and {format_bytes(available)} are free{each} "
        f"({estimate})"
    )
    if force:
        logger.warning("forced: %s", needs)
        return
    raise ConfigError(f"{needs}: {suggest(setting, available)}, or --force true")


def _compiles(wanted: bool | str, device: torch.device) -> bool:
    return bool(wanted) if wanted != "auto" else runtime.why_not_compiled(device) is None


def suggest(setting: Setting, available: int) -> str:
    """Return what to change so that a run fits: the rows of a micro-batch if that is enough, else more."""
    fitting = next((s for s in _smaller(setting) if s.estimate().peak <= available), None)
    if fitting is None:
        return "no model of this vocabulary fits, take a smaller one or more memory"
    changes = []
    if fitting.config != setting.config:
        changes.append(f"model.depth {fitting.config.n_layer}")
    if fitting.compute_dtype != setting.compute_dtype:
        changes.append("model.compute_dtype bfloat16")
    if fitting.device_batch_size != setting.device_batch_size:
        changes.append(f"data.device_batch_size {fitting.device_batch_size}")
    return f"take {' and '.join(changes)}"


def _smaller(setting: Setting) -> Iterator[Setting]:
    """Yield settings by what they cost: a smaller micro-batch nothing but time, another dtype rounding, a depth the model."""
    yield from _micro_batches(setting)
    if setting.compute_dtype == torch.float32:
        setting = replace(setting, compute_dtype=torch.bfloat16)
        yield from _micro_batches(setting)
    config = setting.config
    for depth in range((config.n_layer - 1) // 2 * 2, 0, -2):
        smaller = GPTConfig.from_depth(depth, vocab_size=config.vocab_size, sequence_len=config.sequence_len)
        yield from _micro_batches(replace(setting, config=smaller))


def _micro_batches(setting: Setting) -> Iterator[Setting]:
    """Yield the setting with fewer and fewer rows a micro-batch, those that divide the batch."""
    for rows in range(setting.device_batch_size, 0, -1):
        changed = replace(setting, device_batch_size=rows)
        if changed.divides():
            yield changed
