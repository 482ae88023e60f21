"""When a run is saved: every n steps, at its end, when it is stopped, and when it fails; and what a resumed one takes up."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from nanofed.data.streams import DataState
from nanofed.errors import NanofedError
from nanofed.training.callbacks.dashboard import Dashboard
from nanofed.training.checkpoint.atomic import CheckpointError
from nanofed.training.checkpoint.folder import FOLDER, prune_checkpoints, set_aside
from nanofed.training.gc_control import ManualCollection
from nanofed.training.losses import NonFiniteError
from nanofed.training.module import GPTModule
from nanofed.training.run_folder import Reached, reach
from nanofed.training.run_options import RunOptions

logger = logging.getLogger(__name__)


class SaveCheckpoint(Callback):
    """Saves at full optimizer steps, and only what is finite.

    Every `save_every` steps, at the end of training (before the final validation), when the run is stopped (`Stopping` asks
    for it), and after an error, as of the last full step. A periodic save that cannot be written (no space, a folder that is
    gone) is told and the run goes on, with the older ones kept; any other one ends the run.

    Args:
        options: the run's folder, how often it is saved, and which checkpoints stay.
        dashboard: a save checks its losses and stops its clock.
        garbage: a save ends with a collection.
    """

    def __init__(self, options: RunOptions, dashboard: Dashboard, garbage: ManualCollection) -> None:
        self.newest: Path | None = None  # the last good one that this process has written or read
        self._options = options
        self._dashboard = dashboard
        self._garbage = garbage
        self._saved_step = -1
        # After an error: the full step that the weights are at, the data's place there, and the step under way.
        self._step = 0
        self._data: DataState | None = None
        self._updating: tuple[int, DataState | None] | None = None
        self._between_batches = True
        self._training = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the Trainer's counters where the optimizer's clock stands.

        The saved counters are of micro-batches, which mean something else at another number of ranks, and in the middle of
        an accumulation after an error. The time of `trainer.max_time` counts from each start anew: a run that goes on from where
        one such limit has ended it would have no time left.
        """
        checkpoint.pop("loops", None)
        checkpoint.get("callbacks", {}).pop(Timer.__qualname__, None)
        step = int(checkpoint["optimizer_states"][0]["clock"]["step"])
        loop = trainer.fit_loop.epoch_loop
        loop.batch_progress.total.ready = step * trainer.accumulate_grad_batches
        steps = loop.automatic_optimization.optim_progress.optimizer.step.total
        steps.ready = steps.completed = step
        loop._batches_that_stepped = step
        self._saved_step = step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave out the Trainer's counters: `on_load_checkpoint` says why."""
        checkpoint.pop("loops", None)
        checkpoint["global_step"] = cast(GPTModule, pl_module).clock.step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the start as the last full step."""
        self._commit(cast(GPTModule, pl_module))
        self._training = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on ranks may be in the middle of moving gradients."""
        self._between_batches = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note what the step that begins will have taken in."""
        module = cast(GPTModule, pl_module)
        self._updating = (module.clock.step, module.data_state)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save when a full optimizer step is done and its turn has come, or it was the last."""
        self._between_batches = True
        module = cast(GPTModule, pl_module)
        step = module.clock.step
        if step == self._step:
            return
        self._commit(module)
        if step == module.num_steps:  # a validation at that step comes after the save
            self.save(trainer, module)
        elif self._options.save_every and step % self._options.save_every == 0:
            self.save(trainer, module, last=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last full step, if data or a limit have ended before the steps did: that may be within an accumulation."""
        self._training = False
        module = cast(GPTModule, pl_module)
        module.data_state = self._data
        module.pop_losses()
        self.save(trainer, module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect garbage where the training stands still anyway."""
        self._garbage.collect()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the last full step, if the error has left it whole, and say where to go on."""
        if not self._training or not isinstance(exception, Exception) or isinstance(exception, NonFiniteError):
            return
        module = cast(GPTModule, pl_module)
        failed = f"{type(exception).__name__} after step {module.clock.step:,}"
        if self._rewind(trainer, module) and self._may_save(trainer, module):
            try:
                self.save(trainer, module)
            except Exception as error:  # what went wrong first is what is raised
                logger.error("%s: its state could not be saved (%s)", failed, error)
        logger.error("%s: %s", failed, self.where())

    def where(self) -> str:
        """Say where the last good checkpoint is, and how to go on from it."""
        if self.newest is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.newest}: go on from it with --ckpt_path last"

    def save(self, trainer: Trainer, module: GPTModule, *, last: bool = True) -> None:
        """Save one checkpoint, once a step, and drop the oldest; on all ranks at the same step.

        Raises:
            NonFiniteError: losses, gradients or weights are not finite: nothing is written.
            NanofedError: it could not be written and is the `last`.
        """
        step = module.clock.step
        if step == self._saved_step or step == 0:
            return
        self._dashboard.read_losses()
        check_finite(module)
        path = self._options.folder / FOLDER / f"step_{step:08d}"
        with self._dashboard.paused():
            failure = self._write(trainer, path)
        if failure is None:
            self._saved_step, self.newest = step, path
        elif last:
            self._training = False  # so that its error does not make us try once more
            raise NanofedError(f"the run could not be saved at step {step:,}: {failure}; {self.where()}")
        elif trainer.is_global_zero:
            logger.warning(
                "step %s could not be saved: %s; the run goes on, and %s", f"{step:,}", failure, self.where()
            )
        self._garbage.collect()

    def _write(self, trainer: Trainer, path: Path) -> str | None:
        """Write on the first rank and return, on all of them, why that failed; None if it did not."""
        failure: str | None = None
        try:
            if trainer.is_global_zero:
                set_aside(path)
            trainer.save_checkpoint(path, weights_only=False)
            if trainer.is_global_zero:
                run, keep, every = self._options.folder, self._options.keep_checkpoints, self._options.keep_every
                reach(run, Reached.CHECKPOINT)
                prune_checkpoints(run, keep, every)
        except (OSError, CheckpointError) as error:
            failure = " ".join(str(error).split())
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
        return trainer.strategy.broadcast(failure, src=0)

    def _commit(self, module: GPTModule) -> None:
        self._step, self._data, self._updating = module.clock.step, module.data_state, None

    def _rewind(self, trainer: Trainer, module: GPTModule) -> bool:
        """Put the data back to the last full step; tell whether the weights are at it, which they are but inside a step."""
        if self._updating is not None:
            step, data = self._updating
            if module.clock.step == step:
                return False  # the error came out of the optimizer: parts of the weights may have moved
            self._step, self._data = module.clock.step, data
            self._dashboard.note_step(module, trainer.optimizers[0])
        module.data_state = self._data
        module.pop_losses()
        return True

    def _may_save(self, trainer: Trainer, module: GPTModule) -> bool:
        """Tell whether the state can be put together: with ranks, only where all of them have failed between two batches."""
        if trainer.world_size == 1:
            return True
        return self._between_batches and all_ranks_arrive(f"failed after step {module.clock.step}")


def all_ranks_arrive(at: str, seconds: float = 2.0) -> bool:
    """Tell whether every rank calls this with the same words within `seconds`: by the store, as a collective would hang."""
    store = dist.distributed_c10d._get_default_store()
    count, end = store.add(at, 1), time.monotonic() + seconds
    while count < dist.get_world_size() and time.monotonic() < end:
        time.sleep(0.05)
        count = store.add(at, 0)
    return bool(count >= dist.get_world_size())


def check_finite(module: GPTModule) -> None:
    """Refuse weights that are not finite.

    Raises:
        NonFiniteError: names the first parameter that is not.
    """
    with torch.no_grad():
        named = list(module.gpt.named_parameters())
        finite = torch.stack([torch.isfinite(parameter).all() for _, parameter in named]).tolist()
    if not all(finite):
        name = named[finite.index(False)][0]
        raise NonFiniteError(f"{name} is not finite after step {module.clock.step:,}")
