"""What a federated run shows: TensorBoard, one line a round, and the run's summary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from nanofed.federated.server.display import RoundBar
from nanofed.federated.server.events import KINDS, Events
from nanofed.federated.server.figures import Merged, RoundFigures
from nanofed.federated.wire.plain import plain
from nanofed.training.summary import Point, Summary

logger = logging.getLogger(__name__)

SITES = "sites"
MAX_SITES = 64  # with a folder and an open file each
MAX_NAMED = 8  # in a line of the log


class Board:
    """Writes nanochat's tags with `fed/...` beside them, by step, tokens and seconds, so that both paths overlay.

    The run's own figures are in its folder, those of a client in `sites/<client>` below it. A full disk costs figures, not the
    run.

    Args:
        run: the run's folder.
        summary: what the run has come to so far.
    """

    def __init__(self, run: Path, summary: Summary) -> None:
        self.summary = summary
        self.bar = RoundBar()
        self._run = run
        self._writers: dict[str, SummaryWriter] = {}
        self._is_full = False

    def merged(self, figures: RoundFigures, *, step: int, tokens: int, rows: int, events: Events) -> None:
        """Write what a round came to.

        Args:
            figures: of the round.
            step: optimizer steps of the run so far, which scalars are written at.
            tokens: merged so far.
            rows: merged so far.
            events: of the run so far.
        """
        reports = [part.update.report for part in figures.merged.values()]
        self.summary.tokens = tokens
        self.summary.seconds += figures.train_seconds()
        loss = sum(report.loss_last for report in reports) / len(reports)
        scalars = {
            "train/loss": loss,
            "train/tok_per_sec": sum(report.tokens / report.seconds for report in reports if report.seconds > 0),
            "train/tokens": tokens,
            "train/seconds": self.summary.seconds,
            **figures.scalars(),
            "fed/rows_merged": rows,
            "fed/events_total": events.total(),
            **{f"fed/events/{kind}": count for kind in KINDS if (count := events.total(kind))},
        }
        self._scalars("", scalars, step)
        self._scalars("", {"train/loss_by_tokens": loss}, tokens)
        for client, part in figures.merged.items():
            self._site(client, part, step=step, events=events)
        self.bar.clear()
        logger.info(
            "round %3d  %d of %d clients  %8.2f M tokens  %s steps  train loss %.3f  %7.1f s",
            figures.round,
            len(reports),
            figures.asked,
            tokens / 1e6,
            "+".join(str(report.steps) for report in reports),
            loss,
            self.summary.seconds,
        )

    def _site(self, client: str, part: Merged, *, step: int, events: Events) -> None:
        report = part.update.report
        scalars = {
            "train/loss": report.loss_last,
            "train/tok_per_sec": report.tokens / report.seconds if report.seconds > 0 else 0.0,
            "fed/steps": report.steps,
            "fed/train_seconds": report.seconds,
            "fed/update_norm": part.update.norm,
            "fed/update_scale": part.scale,
            "fed/bytes_up": part.update.payload_bytes,
            "fed/events_total": events.total(client=client),
        }
        if part.cosine is not None:
            scalars["fed/cosine_to_merged"] = part.cosine
        self._scalars(client, scalars, step)

    def validation(
        self, point: Point, *, step: int, seconds: float, sites: Mapping[str, float] | None = None, silent: int = 0
    ) -> None:
        """Write bits per byte after a round: against optimizer steps, as the vanilla path does, tokens and seconds.

        Args:
            point: round, tokens, seconds of training by then, and the figure.
            step: optimizer steps of the run by then.
            seconds: that the evaluation took.
            sites: client -> bits per byte of its own text, where they measured it.
            silent: sites that were asked and gave no figure.
        """
        sites = sites or {}
        self.summary.add(point)
        self._scalars("", {"val/bpb": point.bpb, "fed/evaluate_seconds": seconds}, step)
        self._scalars("", {"val/bpb_by_tokens": point.bpb}, point.tokens)
        self._scalars("", {"val/bpb_by_seconds": point.bpb}, round(point.seconds))
        for client, bpb in sites.items():
            self._scalars(client, {"val/bpb": bpb}, step)
            self._scalars(client, {"val/bpb_by_tokens": bpb}, point.tokens)
        self.bar.clear()
        logger.info(
            "round %3d  %21.2f M tokens  val %.4f bits per byte%s",
            point.step,
            point.tokens / 1e6,
            point.bpb,
            _by_site(sites, silent) if sites else "",
        )
        self.save()

    def text(self, prompt: str, sample: str, step: int) -> None:
        """Write a text sample."""
        self._try(lambda: self._writer("").add_text(f"sample/{plain(prompt, 40)}", sample, step))

    def _scalars(self, client: str, scalars: dict[str, float], step: int) -> None:
        if client not in self._writers and len(self._writers) > MAX_SITES:
            return

        def write() -> None:
            for tag, value in scalars.items():
                self._writer(client).add_scalar(tag, value, step)

        self._try(write)

    def _writer(self, client: str) -> SummaryWriter:
        if client not in self._writers:
            self._writers[client] = SummaryWriter(str(self._run / SITES / client if client else self._run))
        return self._writers[client]

    def _try(self, write: Callable[[], object]) -> None:
        """Write, and where that fails say so once; the next round opens the files anew."""
        try:
            write()
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                logger.warning("the figures of %s cannot be written: %s", self._run, error.strerror or error)
            self._is_full = True
            self._writers.clear()  # TensorBoard's thread of it has ended with the error

    def save(self) -> None:
        """Write events and summary to disk."""
        for writer in list(self._writers.values()):
            self._try(writer.flush)
        self._try(lambda: self.summary.write(self._run))

    def close(self) -> None:
        """Close the event files."""
        self.bar.close()
        self.save()
        for writer in list(self._writers.values()):
            self._try(writer.close)


def _by_site(sites: Mapping[str, float], silent: int) -> str:
    """Return what sites measured, in words, of the first ones by name."""
    named = [f"{client} {bpb:.4f}" for client, bpb in sorted(sites.items())[:MAX_NAMED]]
    named += [f"{len(sites) - MAX_NAMED} more"] if len(sites) > MAX_NAMED else []
    return f" ({', '.join(named)}{f'; {silent} without a figure' if silent else ''})"
