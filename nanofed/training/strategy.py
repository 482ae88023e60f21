"""Data parallel without a reducer: the optimizer moves the gradients, once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from nanofed.errors import ConfigError
from nanofed.optim import DistMuonAdamW

NAME = "sharded"


class ShardedStrategy(DDPStrategy):
    """DDP's processes and launcher, but the module stays as it is: `DistMuonAdamW` reduces, updates and gathers.

    Takes DDPStrategy's arguments. Known to the Trainer as `sharded`; what `auto` means with more than one device.
    """

    strategy_name = NAME

    def configure_ddp(self) -> None:
        """Start all ranks from the first one's weights; nothing is wrapped."""
        assert self.model is not None
        for tensor in self.model.state_dict(keep_vars=True).values():
            dist.broadcast(tensor.detach(), src=0)

    def setup_optimizers(self, trainer: Any) -> None:
        """Let the module make its optimizer, which has to be one that reduces: nobody else does."""
        super().setup_optimizers(trainer)
        if [type(optimizer) for optimizer in self.optimizers] != [DistMuonAdamW]:
            raise ConfigError(f"trainer.strategy {NAME} reduces no gradients: it needs one DistMuonAdamW; or take ddp")

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning's own sign that a micro-batch is not the last of its step."""
        (optimizer,) = self.optimizers
        assert isinstance(optimizer, DistMuonAdamW)
        with optimizer.no_sync():
            yield


def automatic(**trainer: Any) -> str | ShardedStrategy:
    """Return what `strategy: auto` means: sharded where Lightning would take DDP, else Lightning's choice.

    Args:
        trainer: the Trainer's options `accelerator`, `devices` and `num_nodes`.
    """
    choice = _AcceleratorConnector(**trainer).strategy
    if type(choice) is not DDPStrategy:
        return "auto"
    return ShardedStrategy(start_method=choice._start_method)  # fork in a notebook


StrategyRegistry.register(NAME, ShardedStrategy, description="DDP without a reducer, optimizer sharded over ranks")
