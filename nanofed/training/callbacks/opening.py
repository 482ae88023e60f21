"""When a fit writes into its run's folder for the first time, and when the run before it is no longer needed."""

from __future__ import annotations

from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from nanofed import runtime
from nanofed.training.callbacks.dashboard import RunLogger
from nanofed.training.checkpoint.folder import FOLDER, set_aside_later
from nanofed.training.event_files import cut_events
from nanofed.training.module import GPTModule
from nanofed.training.run_folder import Reached, open_run, reach
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import Summary


class Opening(Callback):
    """Opens the run's folder, on the first rank, when nothing is left to be checked.

    A resumed run is opened when the Trainer has loaded its state and made its loader; a new run is opened by the caller of `open`
    before its first validation. The first full step is noted in the run's marker, and a run that it replaces is deleted then.

    Args:
        options: the run's options.
        config: the resolved config, YAML.
        summary: the dashboard's summary, which a resumed run writes anew without the points after its checkpoint.

    Attributes:
        done: whether this process has opened the folder.
    """

    def __init__(self, options: RunOptions, config: str, summary: Summary) -> None:
        self.done = False
        self._options = options
        self._config = config
        self._summary = summary
        self._step: int | None = None

    def open(self, trainer: Trainer, module: GPTModule) -> None:
        """Open the folder, once, and cut its curves and its checkpoints at the step that the module is at."""
        if self.done or not runtime.is_first_rank():
            return
        run = self._options.folder
        open_run(self._options, "fit", self._config)
        cut_events(run, module.clock.step or -1)
        if module.clock.step:
            if (resumed := run / FOLDER / f"step_{module.clock.step:08d}").exists():
                set_aside_later(resumed)
            self._summary.tokens = module.clock.tokens
            self._summary.write(run)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.open(self._options)
        self.done = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the folder of a resumed run."""
        module = cast(GPTModule, pl_module)
        self._step = module.clock.step
        self.open(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Note the first full step."""
        if self._step is not None and cast(GPTModule, pl_module).clock.step > self._step:
            self._step = None
            if trainer.is_global_zero:
                reach(self._options.folder, Reached.STEP)
