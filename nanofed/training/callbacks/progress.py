"""What a person sees of a run while it goes on: the time to its first step, a bar of steps, a line for every validation."""

from __future__ import annotations

import logging
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

from nanofed import streams
from nanofed.training.callbacks.dashboard import Dashboard
from nanofed.training.module import GPTModule
from nanofed.training.startup import Startup

logger = logging.getLogger(__name__)


class Progress(Callback):
    """A bar of optimizer steps on a terminal, and one line for every validation anywhere."""

    def __init__(self, dashboard: Dashboard) -> None:
        self._dashboard = dashboard
        self._bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        module = cast(GPTModule, pl_module)
        if trainer.is_global_zero:
            self._bar = tqdm(
                total=module.num_steps,
                initial=module.clock.step,
                unit="step",
                dynamic_ncols=True,
                disable=not streams.on_terminal(),
                leave=False,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            step = cast(GPTModule, pl_module).clock.step
            loss, speed = self._dashboard.last_loss, self._dashboard.tokens_per_second
            if loss is not None and speed is not None:
                self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s", refresh=False)
            self._bar.update(step - self._bar.n)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the run is."""
        if not trainer.is_global_zero:
            return
        point = self._dashboard.summary.curve[-1]
        module = cast(GPTModule, pl_module)
        speed = self._dashboard.tokens_per_second
        parts = [
            f"step {point.step:>6,}/{module.num_steps:,}",
            f"{point.tokens / 1e6:8.2f} M tokens",
            f"{point.seconds:7.1f} s",
            f"val {point.bpb:.4f} bits per byte",
        ]
        if speed is not None:
            parts.append(f"{speed:,.0f} tok/s")
        if self._bar is not None:
            self._bar.clear()
        logger.info("  ".join(parts))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class FirstStep(Callback):
    """Divides what the Trainer does before the first step is done, and logs it all when it is.

    Args:
        startup: the clock that was started with the command.
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
