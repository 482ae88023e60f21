"""Run `nanofed fit` with a fault in one of its ranks: `faulty_fit.py FAULT RANK arguments of nanofed fit`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from lightning import Callback, LightningModule, Trainer

from nanofed import cli as command_line
from nanofed.errors import DataError
from nanofed.training.lightning_cli import FitCLI

LATE = 20  # micro-batches before the fault: the steady state


class Faulty:
    """A loader that hangs or fails late; all else is the real one's."""

    def __init__(self, loader: Any, fault: str) -> None:
        self._loader = loader
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._loader):
            if number == LATE and self._fault in ("hang", "stop"):
                sys.stdout.write("hangs\n")
                sys.stdout.flush()
                if self._fault == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(3600)
            if number == LATE and self._fault == "data":
                raise DataError("shard_00001.parquet is damaged")
            if number == LATE and self._fault == "bug":
                raise ZeroDivisionError("a bug")
            yield batch


class Slow(Callback):
    """Takes its time after every validation, on one rank; the others go on to the next step."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        time.sleep(SLOW)


SLOW = 5.0  # longer than the limit of a step in the test


def break_it(cli: FitCLI, fault: str) -> None:
    if fault == "slow":
        callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(Slow())
        io = cli.trainer.strategy.checkpoint_io
        save = io.save_checkpoint

        def slow_save(*args: Any, **kwargs: Any) -> None:
            time.sleep(SLOW)
            save(*args, **kwargs)

        io.save_checkpoint = slow_save  # type: ignore[method-assign]
    else:
        loader = cli.datamodule.train_dataloader
        cli.datamodule.train_dataloader = lambda: Faulty(loader(), fault)


class FaultyCLI(FitCLI):
    """FitCLI with the fault, on the one rank."""

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.trainer.global_rank == int(sys.argv[2]):
            break_it(self, sys.argv[1])


if __name__ == "__main__":
    import nanofed.training.lightning_cli

    nanofed.training.lightning_cli.FitCLI = FaultyCLI  # type: ignore[misc]  # which nanofed.api takes
    raise SystemExit(command_line.main(["fit", *sys.argv[3:]]))
