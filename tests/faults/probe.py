"""A callback that writes down every micro-batch's loss, and sends or raises what it was told to at a chosen moment.

`nanofed fit` takes it by `--trainer.callbacks`, so the command under test is the one that people run.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer


class Probe(Callback):
    """Tells where the run is, and disturbs it.

    Args:
        losses: file for a line a micro-batch: rank, optimizer steps done before it, the loss, and whether it was stepped on.
        at: `setup`, `micro` (start of a micro-batch in training) or `validation` (of one within the training).
        number: of that micro-batch in this process, from 1.
        signals: to send there, one at each such moment from then on.
        to: `self`; `parent` (torchrun, or the first rank under Lightning's launcher); `terminal` (its process group).
        rank: the one that sends; -1 for all.
        error: raise OSError there instead.
        nan: multiply the loss of that micro-batch's step by NaN instead.
        seconds: of sleep in every micro-batch.
        late: send the signals up to so many seconds later, at random.
    """

    def __init__(
        self,
        losses: str = "",
        at: str = "",
        number: int = 1,
        signals: list[int] | None = None,
        to: str = "self",
        rank: int = -1,
        error: bool = False,
        nan: bool = False,
        seconds: float = 0.0,
        late: float = 0.0,
    ) -> None:
        self._losses = Path(losses) if losses else None
        self._at = at
        self._number = number
        self._signals = list(signals or [])
        self._to = to
        self._rank = rank
        self._error = error
        self._nan = nan
        self._seconds = seconds
        self._late = late
        self._seen = 0
        self._before = 0

    def _reached(self, trainer: Trainer, at: str) -> None:
        if at != self._at or self._rank not in (-1, trainer.global_rank):
            return
        self._seen += 1
        if self._seen < self._number:
            return
        if self._error:
            raise OSError("the probe's error")
        if self._signals:
            number = self._signals.pop(0)
            if self._late:
                threading.Timer(random.uniform(0, self._late), self._send, [number]).start()
            else:
                self._send(number)

    def _send(self, number: int) -> None:
        match self._to:
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
        time.sleep(self._seconds)
        self._reached(trainer, "micro")
        if self._nan and self._at == "micro" and self._seen == self._number and self._rank in (-1, trainer.global_rank):
            next(pl_module.gpt.parameters()).register_hook(lambda gradient: gradient * float("nan"))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._losses is not None:
            line = [
                trainer.global_rank,
                self._before,
                float(outputs["loss"]).hex(),
                pl_module.clock.step > self._before,
            ]
            with self._losses.open("a") as file:
                file.write(json.dumps(line) + "\n")
