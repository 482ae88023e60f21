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
    """Draws a bar of optimizer steps on a terminal, and logs a line for every validation and one for the start.

    The line for the start comes with the first optimizer step. It divides the time since the command began into parts.

    Args:
        dashboard: the callback that knows loss, speed and the last validation; the Trainer calls it before this one.
        startup: the clock that was started with the command.
    """

    def __init__(self, dashboard: Dashboard, startup: Startup) -> None:
        self._dashboard = dashboard
        self._startup: Startup | None = startup  # None once the first step is done
        self._bar: tqdm[Any] | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End what the Trainer does before it makes the model."""
        self._done("trainer")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the making of the model: it is initialised and on its device."""
        self._done("model")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the making of optimizer and loaders (in a resumed run, of the model and its loading too); open the bar."""
        module = cast(GPTModule, pl_module)
        self._done("optimizer")
        self._step = module.clock.step
        if trainer.is_global_zero:
            self._bar = tqdm(
                total=module.num_steps,
                initial=module.clock.step,
                unit="step",
                dynamic_ncols=True,
                disable=not streams.on_terminal(),
                leave=False,
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Move the bar; log how long the start took when the first optimizer step is done."""
        step = cast(GPTModule, pl_module).clock.step
        if self._bar is not None:
            loss, speed = self._dashboard.last_loss, self._dashboard.tokens_per_second
            if loss is not None and speed is not None:
                self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s", refresh=False)
            self._bar.update(step - self._bar.n)
        if self._startup is not None and step > self._step:
            self._done("step")
            logger.info("%s", self._startup)
            self._startup = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where the run is."""
        self._done("validation")
        if not trainer.is_global_zero:
            return
        point, speed = self._dashboard.summary.curve[-1], self._dashboard.tokens_per_second
        parts = [
            f"step {point.step:>6,}/{cast(GPTModule, pl_module).num_steps:,}",
            f"{point.tokens / 1e6:8.2f} M tokens",
            f"{point.seconds:7.1f} s",
            f"val {point.bpb:.4f} bits per byte",
            *([f"{speed:,.0f} tok/s"] if speed is not None else []),
        ]
        if self._bar is not None:
            self._bar.clear()
        logger.info("  ".join(parts))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def _done(self, part: str) -> None:
        if self._startup is not None:
            self._startup.done(part)
