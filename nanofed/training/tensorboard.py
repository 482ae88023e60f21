"""What both training paths write into TensorBoard alike: bits per byte by tokens, seconds and bytes, and the run's config."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from nanofed.training.summary import CONFIG, UNITS, Point

logger = logging.getLogger(__name__)

LAYOUT = {"bits per byte": {UNITS[by]: ["Multiline", [f"^bpb/by_{by}$"]] for by in UNITS}}


class Attempts:
    """Writes figures of a run. Where they cannot be written, on a full disk say, that is said once and ends no run.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._failed = False

    def __call__(self, write: Callable[[], object]) -> bool:
        """Write, and tell whether it was possible; TensorBoard's writer is of no use after an error, its thread has ended."""
        try:
            write()
        except OSError as error:
            if not self._failed:
                logger.warning("the figures of %s cannot be written: %s", self._run, error.strerror or error)
            self._failed = True
            return False
        self._failed = False
        return True


def write_point(writer: Any, point: Point, step: int) -> None:
    """Write a validation: as nanochat's `val/bpb` at its optimizer step, and on the axes on which runs of both paths overlay.

    Tags sort by name, so `bpb/...` stands first. `event_files.py` cuts the other axes with the figure by steps before them.

    Args:
        writer: TensorBoard's SummaryWriter.
        point: The validation.
        step: Optimizer steps of the run by then.
    """
    writer.add_scalar("val/bpb", point.bpb, step)
    writer.add_scalar("bpb/by_tokens", point.bpb, point.tokens)
    writer.add_scalar("bpb/by_seconds", point.bpb, round(point.seconds))
    if point.bytes:
        writer.add_scalar("bpb/by_bytes", point.bpb, point.bytes)


def describe(writer: Any, run: Path) -> None:
    """Write a run's config, as text and as hyper-parameters beside its bits per byte, and how its curves are laid out."""
    from torch.utils.tensorboard.summary import hparams

    text = (run / CONFIG).read_text(encoding="utf-8")
    writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), 0)
    writer.add_custom_scalars(LAYOUT)
    for summary in hparams(dict(_flat(yaml.safe_load(text))), {"val/bpb": 0.0}):  # type: ignore[no-untyped-call]
        writer.file_writer.add_summary(summary, 0)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else str(value)
