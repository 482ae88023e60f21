"""What a person sees of a run while it goes on: the time to its first step, a line that moves, a line for every validation."""

from __future__ import annotations

import logging
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from nanofed import terminal
from nanofed.training.callbacks.dashboard import Dashboard
from nanofed.training.module import GPTModule
from nanofed.training.startup import Startup

logger = logging.getLogger(__name__)


class Progress(Callback):
    """Logs a line for every validation and one for the start, and shows on a terminal how far the run is in between.

    The line for the start comes with the first optimizer step. It divides the time since the command began into parts. The line
    that moves shows figures that are read for the dashboard anyway: nothing waits for the device because of it.

    Args:
        dashboard: the callback that knows loss, speed and the last validation; the Trainer calls it before this one.
        startup: the clock that was started with the command.
    """

    def __init__(self, dashboard: Dashboard, startup: Startup) -> None:
        self._dashboard = dashboard
        self._startup: Startup | None = startup  # None once the first step is done
        self._line = terminal.StatusLine(self._text)
        self._module: GPTModule
        self._validating = False
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End what the Trainer does before it makes the model."""
        self._done("trainer")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the making of the model: it is initialised and on its device."""
        self._done("model")
        self._validating = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the making of optimizer and loaders (in a resumed run, of the model and its loading too); show the line."""
        self._module = cast(GPTModule, pl_module)
        self._done("optimizer")
        self._step = self._module.clock.step
        if trainer.is_global_zero:
            self._line.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Log how long the start took when the first optimizer step is done."""
        if self._startup is not None and cast(GPTModule, pl_module).clock.step > self._step:
            self._done("step")
            logger.info("%s", self._startup)
            self._startup = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where the run is."""
        self._done("validation")
        self._validating = False
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
        logger.info("  ".join(parts))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the line away."""
        self._line.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the line away, also where the run is stopped."""
        self._line.stop()

    def _text(self, columns: int) -> str:
        clock, steps, dashboard = self._module.clock, self._module.num_steps, self._dashboard
        parts = [f"step {clock.step:,}/{steps:,}", *(["validating"] if self._validating else [])]
        if speed := dashboard.tokens_per_second:
            to_go = (steps - clock.step) * clock.step_tokens / speed
            parts += [f"{speed:,.0f} tok/s", f"{terminal.duration(to_go)} to go"]
        if (loss := dashboard.last_loss) is not None:
            parts.append(f"loss {loss:.3f}")
        if (bpb := dashboard.summary.bpb_end) is not None:
            parts.append(f"bpb {bpb:.4f}")
        return terminal.fitting(parts, columns)

    def _done(self, part: str) -> None:
        if self._startup is not None:
            self._startup.done(part)
