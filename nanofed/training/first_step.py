"""Says once how long a run took to its first optimizer step, and on what."""

from __future__ import annotations

import logging
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from nanofed.training.module import GPTModule
from nanofed.training.startup import Startup

logger = logging.getLogger(__name__)


class FirstStep(Callback):
    """Divides what the Trainer does before the first step is done, and logs it all when it is.

    Args:
        startup: begun when the command was.
    """

    def __init__(self, startup: Startup) -> None:
        self._startup = startup
        self._waiting = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End what the Trainer does before it makes the model."""
        self._done("trainer")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the making of the model: it is initialised and on its device."""
        self._done("model")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the validation before the first step."""
        self._done("validation")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the making of optimizer and loaders; in a resumed run, that of the model and its loading too."""
        self._done("optimizer")
        self._step = cast(GPTModule, pl_module).clock.step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say it when an optimizer step is done."""
        if self._waiting and cast(GPTModule, pl_module).clock.step > self._step:
            self._done("step")
            self._waiting = False
            logger.info("%s", self._startup)

    def _done(self, part: str) -> None:
        if self._waiting:
            self._startup.done(part)
