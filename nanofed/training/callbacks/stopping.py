"""A signal to one rank or to all of them stops the run at one full optimizer step, saved."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from nanofed.training.callbacks.saving import SaveCheckpoint
from nanofed.training.module import GPTModule
from nanofed.training.signals import Signals, Stopped


class Vote:
    """All ranks' wishes to stop, agreed on without a step waiting for them.

    Every rank votes at every full step and learns the outcome of the vote of the step before, which has long been counted:
    so all of them learn it at the same step. A wish is a signal's number, 0 for none; the greatest wins.
    """

    def __init__(self, device: torch.device) -> None:
        self._vote = torch.zeros(1, dtype=torch.int32, device=device)
        self._outcome = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._counted: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._work: Any = None

    def next(self, wish: int) -> int:
        """Return the outcome of the vote before, and start another one."""
        outcome = self._read()
        self._vote.fill_(wish)
        self._work = dist.all_reduce(self._vote, op=dist.ReduceOp.MAX, async_op=True)
        if self._counted is not None:
            self._work.wait()  # orders the stream, not this thread
            self._outcome.copy_(self._vote, non_blocking=True)
            self._counted.record()
        return outcome

    def now(self, wish: int) -> int:
        """Return the outcome of a vote that is waited for, or of the one before it."""
        return max(self.next(wish), self._read())

    def _read(self) -> int:
        if self._work is None:
            return 0
        if self._counted is not None:
            self._counted.synchronize()
        else:
            self._work.wait()
            self._outcome.copy_(self._vote)
        self._work = None
        return int(self._outcome)


class Stopping(Callback):
    """Ends a run that a signal has asked to stop: at a full optimizer step, saved, on all ranks alike.

    Before the first step there is nothing to save, and `signals` end the run by themselves. A validation is cut short; its
    figure does not count.

    Args:
        signals: the signals that this process has received.
        saver: the callback that saves the run before it ends; the Trainer calls it before this one.

    Raises:
        Stopped: the run was asked to stop; it is raised in place of the next step.
    """

    def __init__(self, signals: Signals, saver: SaveCheckpoint) -> None:
        self._signals = signals
        self._saver = saver
        self._vote: Vote | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know the ranks that this process has started: they are to be told."""
        self._signals.children = getattr(trainer.strategy.launcher, "procs", ())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the vote, where there are ranks to vote."""
        self._step = cast(GPTModule, pl_module).clock.step
        self._vote = Vote(trainer.strategy.root_device) if trainer.world_size > 1 else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Stop at a full step if that is what was agreed."""
        module = cast(GPTModule, pl_module)
        if module.clock.step == self._step:
            return
        self._step = module.clock.step
        wish = self._signals.received or 0
        if not self._signals.patient:
            self._signals.patient = True  # from here on there is something to save
            outcome = self._agreed()
        else:
            outcome = self._vote.next(wish) if self._vote else wish
        if outcome:
            self._stop(trainer, module, outcome)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Skip the rest of a validation within the training; other ranks may not know yet, and come to its end."""
        if self._signals.received and self._signals.patient:
            raise StopIteration

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop in place of counting up the validation."""
        if self._signals.patient and (outcome := self._agreed()):
            self._stop(trainer, cast(GPTModule, pl_module), outcome)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is saved: from here on a signal ends the run by itself."""
        outcome = self._agreed()
        self._signals.patient = False
        if outcome:
            self._stop(trainer, cast(GPTModule, pl_module), outcome)

    def _agreed(self) -> int:
        wish = self._signals.received or 0
        return self._vote.now(wish) if self._vote else wish

    def _stop(self, trainer: Trainer, module: GPTModule, outcome: int) -> None:
        self._saver.save(trainer, module)
        raise Stopped(self._signals.received or outcome)


def take_signals(trainer: Trainer) -> None:
    """Keep Lightning out of the signals, and from asking all ranks for them before every micro-batch (a device sync).

    Its own handling of a signal raises in the middle of an accumulation.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer._signal_connector.teardown = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
