"""Weights & Biases gets the scalars that a run writes into TensorBoard, its config and its summary."""

from __future__ import annotations

import importlib
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from nanofed.errors import ConfigError, DataError
from nanofed.files import write_atomically
from nanofed.training.event_files import OTHER_AXES
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import CONFIG, Summary

ID_FILE = "wandb-id.txt"  # of the run's folder: the name by which wandb knows the run for good


def check_wandb(options: RunOptions) -> None:
    """Refuse a run whose figures could not be sent.

    Raises:
        ConfigError: The package is missing, or nobody is logged in.
    """
    with _wandb(options) as wandb:
        if wandb.setup().settings.mode == "online":
            wandb.login()  # it asks for the key on a terminal, and asks no server


@contextmanager
def _wandb(options: RunOptions) -> Iterator[Any]:
    """Yield the package `wandb`, and turn its errors into nanofed's own, of one line."""
    try:
        importlib.import_module("wandb.sdk")  # a mere folder, such as wandb itself makes, could be imported as wandb
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError("--wandb_project needs wandb: pip install 'nanofed-lightning[wandb]'") from error
    try:
        yield wandb
    except wandb.errors.CommError as error:
        hint = "WANDB_MODE=offline keeps the figures here, and `wandb sync` sends them later"
        raise DataError(f"Weights & Biases cannot be reached: {' '.join(str(error).split())}; {hint}") from error
    except wandb.errors.Error as error:
        raise ConfigError(f"--wandb_project {options.wandb_project}: {' '.join(str(error).split())}") from error


class WandbRun:
    """The run at Weights & Biases that belongs to a run folder: a run that goes on from a checkpoint goes on in it.

    Args:
        options: The run's options, which name its folder, and the project and the run at Weights & Biases.

    Raises:
        ConfigError: The package is missing, or the project or the key is refused.
        DataError: The server of Weights & Biases cannot be reached.
    """

    def __init__(self, options: RunOptions) -> None:
        folder = options.folder
        path = folder / ID_FILE
        if not path.exists():
            write_atomically(path, secrets.token_hex(8) + "\n")
        with _wandb(options) as wandb:
            self._run = wandb.init(
                project=options.wandb_project,
                name=options.run_name or options.name,
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(folder),
                config=yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")),
                # With a console it would keep all that is printed, the line that moves too.
                settings=wandb.Settings(console="off"),
            )
        self._known: set[str] = set()  # tags whose axis is said

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Log a scalar. Its axis is what TensorBoard takes for the step: tokens, seconds or bytes where the tag says so."""
        axis = next((name for name in OTHER_AXES if tag.endswith(name)), "by_step").removeprefix("by_")
        if tag not in self._known:
            self._known.add(tag)
            self._run.define_metric(tag, step_metric=axis)
        self._run.log({tag: value, axis: step})

    def finish(self, summary: Summary) -> None:
        """Send the run's final figures and end it; it counts as failed while an exception is handled."""
        names = ("bpb_start", "bpb_end", "tokens", "seconds", "bytes", "ended")
        self._run.summary.update({name: getattr(summary, name) for name in names})
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))


class MirroredWriter:
    """TensorBoard's SummaryWriter, whose scalars go to a run of Weights & Biases as well."""

    def __init__(self, writer: Any, run: WandbRun) -> None:
        self._writer = writer
        self._run = run

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a scalar at a step."""
        self._writer.add_scalar(tag, value, step)
        self._run.scalar(tag, float(value), step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)
