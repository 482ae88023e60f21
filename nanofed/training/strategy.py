"""Data parallel without a reducer: the optimizer moves the gradients, once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.kubeflow import KubeflowEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch.nn import Module
from torch.optim import Optimizer

from nanofed import runtime
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
        send_weights(self.model)

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


class FabricShardedStrategy(FabricDDPStrategy):
    """DDP for a Fabric loop without a reducer: the module is not wrapped, and one `DistMuonAdamW` moves the gradients.

    Takes DDPStrategy's arguments.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._backward_sync_control = _OptimizerControl()

    def setup_module(self, module: Module) -> Module:  # type: ignore[override]
        """Start all ranks from the first one's weights; nothing is wrapped."""
        send_weights(module)
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Remember the optimizer, which has to be one that reduces."""
        if not isinstance(optimizer, DistMuonAdamW):
            raise ConfigError("a sharded Fabric loop reduces no gradients: it needs one DistMuonAdamW")
        assert isinstance(self._backward_sync_control, _OptimizerControl)
        self._backward_sync_control.optimizer = optimizer
        return super().setup_optimizer(optimizer)


class _OptimizerControl(_BackwardSyncControl):
    optimizer: DistMuonAdamW

    def no_backward_sync(self, module: Module, enabled: bool) -> AbstractContextManager[None]:
        return self.optimizer.no_sync() if enabled else nullcontext()


def send_weights(module: Module) -> None:
    """Give all ranks the first one's weights."""
    for tensor in module.state_dict(keep_vars=True).values():
        dist.broadcast(tensor.detach(), src=0)


ENVIRONMENTS: dict[str, type[ClusterEnvironment]] = {
    "torchrun": TorchElasticEnvironment,
    "srun": SLURMEnvironment,
    "jsrun": LSFEnvironment,
    "mpirun": MPIEnvironment,
    "env": KubeflowEnvironment,
}


def cluster_environment() -> ClusterEnvironment:
    """Return Lightning's name for what `runtime.launch` has found, so that both agree on who is which rank."""
    return ENVIRONMENTS.get(runtime.launch().by, LightningEnvironment)()


def automatic(**trainer: Any) -> str | ShardedStrategy:
    """Return what `strategy: auto` means: sharded where Lightning would take DDP, else Lightning's choice.

    Args:
        trainer: the Trainer's options `accelerator`, `devices`, `num_nodes` and `plugins`.
    """
    choice = _AcceleratorConnector(**trainer).strategy
    if type(choice) is not DDPStrategy:
        return "auto"
    return ShardedStrategy(start_method=choice._start_method)  # fork in a notebook


StrategyRegistry.register(NAME, ShardedStrategy, description="DDP without a reducer, optimizer sharded over ranks")
