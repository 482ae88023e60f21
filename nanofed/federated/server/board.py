"""What a federated run shows: TensorBoard, one line a round, and the run's summary."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from nanofed.training.run import Point, Summary

logger = logging.getLogger(__name__)


class Board:
    """Writes nanochat's tags with `fed/...` beside them, by step and by tokens, so that both paths overlay.

    Args:
        run: the run's folder.
        summary: what the run has come to so far.
    """

    def __init__(self, run: Path, summary: Summary) -> None:
        self.summary = summary
        self._run = run
        self._writer = SummaryWriter(str(run))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars at a round."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def validation(self, *, round_number: int, step: int, tokens: int, bpb: float) -> None:
        """Write bits per byte after a round: against optimizer steps, as the vanilla path does, and against tokens."""
        self.summary.add(Point(round_number, tokens, round(self.summary.seconds, 3), bpb))
        self._writer.add_scalar("val/bpb", bpb, step)
        self._writer.add_scalar("val/bpb_by_tokens", bpb, tokens)
        self.save()

    def text(self, prompt: str, sample: str, step: int) -> None:
        """Write a text sample."""
        self._writer.add_text(f"sample/{prompt[:40]}", sample, step)

    def save(self) -> None:
        """Write events and summary to disk."""
        self._writer.flush()
        self.summary.write(self._run)

    def close(self) -> None:
        """Close the event file."""
        self.save()
        self._writer.close()
