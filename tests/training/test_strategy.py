"""Which strategy a run gets."""

from __future__ import annotations

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from nanofed.errors import ConfigError
from nanofed.training.strategy import ShardedStrategy, automatic


def test_auto_is_lightnings_on_one_device_and_sharded_on_more() -> None:
    assert automatic(accelerator="cpu", devices=1, num_nodes=1) == "auto"
    assert isinstance(automatic(accelerator="cpu", devices=2, num_nodes=1), ShardedStrategy)
    assert isinstance(automatic(accelerator="cpu", devices=1, num_nodes=2), ShardedStrategy)


def test_both_have_their_names() -> None:
    sharded = Trainer(accelerator="cpu", devices=2, strategy="sharded", logger=False, enable_checkpointing=False)
    assert type(sharded.strategy) is ShardedStrategy
    stock = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    assert type(stock.strategy) is DDPStrategy


def test_an_optimizer_that_does_not_reduce_is_refused() -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss: Tensor = self.layer(batch).sum()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = Trainer(accelerator="cpu", devices=1, strategy="sharded", logger=False, enable_checkpointing=False)
    module = Module()
    module.trainer = trainer
    trainer.strategy.connect(module)
    with pytest.raises(ConfigError, match="needs one DistMuonAdamW"):
        trainer.strategy.setup_optimizers(trainer)
