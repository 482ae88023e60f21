"""CORE while a run trains."""

from __future__ import annotations

import logging
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from nanofed import terminal
from nanofed.evaluation.core.bundle import Bundle
from nanofed.evaluation.core.score import evaluate_core
from nanofed.training.callbacks.dashboard import Dashboard
from nanofed.training.callbacks.watchdog import Watchdog
from nanofed.training.evaluate import write_scalars
from nanofed.training.module import GPTModule
from nanofed.training.run_options import RunOptions

logger = logging.getLogger(__name__)


class CoreEvaluation(Callback):
    """Measures CORE every `core_every` optimizer steps, on all ranks, after a validation.

    It draws from no generator of the run and its seconds are no training time, so that a run ends in the same bits with it and
    without. A run that is killed while it measures goes on without that point.

    Args:
        options: The run's options, which say every how many steps CORE is measured, and on which bundle.
        dashboard: The callback whose clock of training time is stopped while CORE is measured.
        watchdog: The callback that is told of each batch, so that a long measurement is not taken for a rank that hangs.
    """

    def __init__(self, options: RunOptions, dashboard: Dashboard, watchdog: Watchdog) -> None:
        self._options = options
        self._dashboard = dashboard
        self._watchdog = watchdog

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and write CORE where it is due."""
        module, options = cast(GPTModule, pl_module), self._options
        if not options.core_every or module.clock.step % options.core_every:
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        with self._dashboard.paused(), terminal.without_line():  # it draws a bar of its own
            score = evaluate_core(
                module.gpt,
                datamodule.tokenizer,
                Bundle.read(options.core_data),
                examples=options.core_examples,
                progress=True,
                on_batch=self._watchdog.progress,
            )
        if trainer.is_global_zero:
            logger.info("step %s  %s", f"{module.clock.step:,}", score.line())
        at = (module.clock.step, module.clock.tokens)
        self._dashboard.write(trainer, lambda writer: write_scalars(writer, score, *at))
        self._dashboard.write(trainer, lambda writer: writer.flush())
