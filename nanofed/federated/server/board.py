"""What a federated run shows: TensorBoard, one line a round, and the run's summary."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from nanofed.federated.server.validation import Update
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

    def merged(
        self,
        accepted: Mapping[str, Update],
        norms: Mapping[str, float],
        *,
        round_number: int,
        step: int,
        tokens: int,
        figures: Mapping[str, float],
    ) -> None:
        """Write what a round came to.

        Args:
            accepted: client -> its merged reply.
            norms: client -> L2 norm of its update.
            round_number: of the round.
            step: optimizer steps of the run so far, which scalars are written at.
            tokens: merged so far.
            figures: further scalars by tag.
        """
        reports = [update.report for update in accepted.values()]
        self.summary.tokens = tokens
        # Clients train at the same time, each on its own clock.
        seconds = max(report.seconds for report in reports)
        self.summary.seconds += seconds
        loss = sum(report.loss_last for report in reports) / len(reports)
        scalars = {
            "train/loss": loss,
            "train/tok_per_sec": sum(report.tokens / report.seconds for report in reports if report.seconds > 0),
            "train/tokens": tokens,
            "train/seconds": self.summary.seconds,
            "fed/round": round_number,
            "fed/clients_merged": len(accepted),
            "fed/steps_mean": sum(report.steps for report in reports) / len(reports),
            "fed/bytes_up": sum(update.payload_bytes for update in accepted.values()),
            "fed/train_seconds": seconds,
            "fed/update_norm_mean": sum(norms.values()) / len(norms),
            "fed/update_norm_max": max(norms.values()),
            **figures,
        }
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.add_scalar("train/loss_by_tokens", loss, tokens)
        logger.info(
            "round %3d  %d of %d clients  %8.2f M tokens  %s steps  train loss %.3f  %7.1f s",
            round_number,
            len(accepted),
            int(figures["fed/clients_asked"]),
            tokens / 1e6,
            "+".join(str(report.steps) for report in reports),
            loss,
            self.summary.seconds,
        )

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
