"""A callback that writes down every micro-batch's loss, and sends or raises what it was told to at a chosen moment.

`nanofed fit` takes it by `--trainer.callbacks`, so the command under test is the one that people run.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer


@dataclass(eq=False)
class Probe(Callback):
    """Tells where the run is, and disturbs it."""

    losses: str = ""  # file for a line a micro-batch: rank, optimizer steps before it, loss, whether it was stepped on
    at: str = ""  # `setup`, `micro` (start of a micro-batch in training) or `validation` (of one within the training)
    number: int = 1  # of that micro-batch in this process, from 1
    signals: list[int] = field(default_factory=list)  # to send there, one at each such moment from then on
    to: str = "self"  # or `parent` (torchrun, or the first rank under Lightning's launcher), `terminal` (process group)
    rank: int = -1  # the one that sends; -1 for all
    error: bool = False  # raise OSError there instead
    stop: bool = False  # set the Trainer's `should_stop` there instead, as a limit of its own does
    nan: bool = False  # multiply the loss of that micro-batch's step by NaN instead
    seconds: float = 0.0  # of sleep in every micro-batch
    late: float = 0.0  # send the signals up to so many seconds later, at random

    def __post_init__(self) -> None:
        self._signals = list(self.signals)
        self._seen = 0
        self._before = 0

    def _reached(self, trainer: Trainer, at: str) -> None:
        if at != self.at or self.rank not in (-1, trainer.global_rank):
            return
        self._seen += 1
        if self._seen < self.number:
            return
        if self.error:
            raise OSError("the probe's error")
        trainer.should_stop = trainer.should_stop or self.stop
        if self._signals:
            number = self._signals.pop(0)
            if self.late:
                threading.Timer(random.uniform(0, self.late), self._send, [number]).start()
            else:
                self._send(number)

    def _send(self, number: int) -> None:
        match self.to:
            case "self":
                os.kill(os.getpid(), number)
            case "parent":
                os.kill(os.getppid(), number)
            case "terminal":
                os.killpg(os.getpgid(os.getppid()), number)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._reached(trainer, "setup")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit":
            self._reached(trainer, "validation")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._before = pl_module.clock.step
        time.sleep(self.seconds)
        self._reached(trainer, "micro")
        if self.nan and self.at == "micro" and self._seen == self.number and self.rank in (-1, trainer.global_rank):
            next(pl_module.gpt.parameters()).register_hook(lambda gradient: gradient * float("nan"))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.losses:
            stepped = pl_module.clock.step > self._before
            line = [trainer.global_rank, self._before, float(outputs["loss"]).hex(), stepped]
            with Path(self.losses).open("a") as file:
                file.write(json.dumps(line) + "\n")
