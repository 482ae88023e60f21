"""The figures of a federation: TensorBoard, one line of the log a round, and the run's summary."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from nanofed.errors import NanofedError
from nanofed.evaluation.core.score import CoreScore
from nanofed.federated.aggregation.norm_guard import Length
from nanofed.federated.server.events import KINDS, Events
from nanofed.federated.wire.messages import Report
from nanofed.federated.wire.plain_text import plain
from nanofed.training.evaluate import write_scalars
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import Point, Summary
from nanofed.training.tensorboard import Attempts, describe, write_point
from nanofed.training.wandb_run import MirroredWriter, WandbRun

logger = logging.getLogger(__name__)

SITES = "sites"  # the folder of a run in which every client has a folder of event files
MAX_SITES = 64  # clients that get a folder and an open file each
MAX_NAMED = 8  # clients that a line of the log names


@dataclass
class MergedUpdate:
    """A client's part in a round that was merged."""

    report: Report  # the client's report, with no more tokens than are counted for it
    length: Length  # the L2 norms of the update, of the whole and by parameter group
    weight: float  # the client's share in the mean; shares need not sum to 1
    # Time from the dispatch to the checked reply, without the time in which the client evaluated the weights.
    seconds: float
    before: float  # time from the client's last reply to the dispatch, infinite where there was none
    held: bool  # the update waited on disk until the others of its round were known
    scale: float = 1.0  # the factor of the update, below 1 where its norm was clipped
    cosine: float = 0.0  # the cosine of the update and the merged update, once that is known
    # How many updates were merged between the dispatch and this one, where each is merged when it comes; 0 in rounds.
    age: int = 0
    damping: float = 1.0  # the factor of the update for its age


@dataclass
class RoundMetrics:
    """What one round came to."""

    round: int  # number of the round, from 1
    # How many clients were sent the round; of those that are waited for one by one, how many replied or were given up.
    asked: int
    merged: dict[str, MergedUpdate] = field(default_factory=dict)  # the merged updates by client
    silent: int = 0  # how many clients sent no reply in time; those neither merged nor silent were refused
    # Bytes that each client is sent, of weights or of what changed in them, without framing.
    client_bytes_down: dict[str, int] = field(default_factory=dict)
    client_bytes_up: int = 0  # bytes of the weights that each client sends back, without framing
    wait: float = 0.0  # seconds until there was a quorum
    encode: float = 0.0  # seconds in which the weights were encoded and the instructions written
    exchange: float = 0.0  # seconds from the dispatch to the last reply
    merge: float = 0.0  # seconds of folding, of the outer step and of the commit
    merged_norm: float = 0.0  # L2 norm of the pseudo-gradient
    # How many clients train at the same time where each is merged when it comes; 1 in rounds, which merge all.
    in_flight: int = 1

    @property
    def norms(self) -> list[float]:
        """The L2 norm of each client's update as it was merged."""
        return [part.length.norm * part.scale for part in self.merged.values()]

    @property
    def bytes_down(self) -> int:
        """Bytes that all clients are sent, without framing."""
        return sum(self.client_bytes_down.values())

    @property
    def bytes_up(self) -> int:
        """Bytes of the updates that came, merged or not, without framing."""
        return (self.asked - self.silent) * self.client_bytes_up

    @property
    def train_seconds(self) -> float:
        """The longest training: clients train at the same time, each on its own clock; merged one by one, each has its share."""
        return max(part.report.training_seconds for part in self.merged.values()) / self.in_flight

    @property
    def seconds(self) -> float:
        """From the end of the round before to this one's."""
        return self.wait + self.encode + self.exchange + self.merge

    @property
    def utilisation(self) -> float:
        """The share of the round in which a client trains, on average."""
        trained = math.fsum(part.report.training_seconds for part in self.merged.values())
        return trained / len(self.merged) / self.in_flight / self.seconds

    def scalars(self) -> dict[str, float]:
        """Return the scalars of the round by tag."""
        parts, norms = list(self.merged.values()), self.norms
        reports = [part.report for part in parts]
        cosines = [part.cosine for part in parts]
        mean_norm = math.fsum(norms) / len(norms)
        out = {
            "train/loss": sum(report.loss_last for report in reports) / len(reports),
            "train/tok_per_sec": sum(report.tokens_per_second for report in reports),
            "fed/round": self.round,
            "fed/clients_asked": self.asked,
            "fed/clients_merged": len(parts),
            "fed/clients_late": self.silent,
            "fed/clients_refused": self.asked - len(parts) - self.silent,
            "fed/steps_mean": math.fsum(report.steps for report in reports) / len(parts),
            "fed/bytes_up": self.bytes_up,
            "fed/bytes_down": self.bytes_down,
            "fed/wait_seconds": self.wait,
            "fed/encode_seconds": self.encode,
            "fed/train_seconds": self.train_seconds,
            "fed/transfer_seconds": max(0.0, *(part.seconds - part.report.seconds for part in parts)),
            "fed/merge_seconds": self.merge,
            "fed/round_seconds": self.seconds,
            "fed/utilisation": self.utilisation,
            "fed/update_norm_mean": mean_norm,
            "fed/update_norm_max": max(norms),
            "fed/update_norm_merged": self.merged_norm,
            # 1 where all clients move alike, 1/sqrt(n) where their updates have nothing in common.
            "fed/drift": self.merged_norm / mean_norm if mean_norm else 0.0,
            "fed/cosine_to_merged_mean": math.fsum(cosines) / len(cosines),
            "fed/cosine_to_merged_min": min(cosines),
        }
        if self.in_flight > 1:
            out["fed/clients_in_flight"] = self.in_flight
            out["fed/age"] = max(part.age for part in parts)
            out["fed/damping"] = min(part.damping for part in parts)
        if (cosine := self.cosine_between_clients()) is not None:
            out["fed/cosine_between_clients"] = cosine
        return out

    def cosine_between_clients(self) -> float | None:
        """Return the mean cosine of pairs of updates, weighted by their lengths and shares; None for a single client.

        It follows from the norms of the updates u_i and of their weighted mean alone: |sum w_i u_i|^2 is the sum of
        w_i^2 |u_i|^2 plus the sum of w_i w_j <u_i, u_j> over pairs. It holds where the merge is the mean.
        """
        lengths = [part.weight * norm for part, norm in zip(self.merged.values(), self.norms, strict=True)]
        own = math.fsum(length**2 for length in lengths)
        largest = math.fsum(lengths) ** 2 - own
        if len(lengths) < 2 or largest <= 0:
            return None
        total = math.fsum(part.weight for part in self.merged.values())
        return max(-1.0, min(1.0, ((self.merged_norm * total) ** 2 - own) / largest))


class FederationMetrics:
    """Writes nanochat's tags with `fed/...` beside them, by step, tokens and seconds, so that both training paths overlay.

    The figures of the whole run are in the run's folder, those of a client in `sites/<client>` below it. A full disk costs
    figures and does not end the run.

    Args:
        options: The run's folder, and where its figures go besides.
        summary: What the run has come to so far.
    """

    def __init__(self, options: RunOptions, summary: Summary) -> None:
        self.summary = summary
        self._options = options
        self._run = options.folder
        self._wandb: WandbRun | None = None
        self._wandb_is_lost = False
        self._writers: dict[str, SummaryWriter] = {}
        self._attempt = Attempts(self._run)

    def merged(self, figures: RoundMetrics, *, step: int, tokens: int, rows: int, events: Events) -> None:
        """Write what a round came to, with the run's steps, tokens, rows and events so far; scalars stand at the step."""
        self.summary.tokens = tokens
        self.summary.seconds += figures.train_seconds
        scalars = {
            **figures.scalars(),
            "fed/bytes_total": self.summary.bytes,
            "train/tokens": tokens,
            "train/seconds": self.summary.seconds,
            "fed/rows_merged": rows,
            "fed/events_total": events.total(),
            **{f"fed/events/{kind}": count for kind in KINDS if (count := events.total(kind))},
        }
        loss = scalars["train/loss"]
        self._scalars("", scalars, step)
        self._scalars("", {"train/loss_by_tokens": loss}, tokens)
        norms = np.array(figures.norms)
        self._try(lambda: self._writer("").add_histogram("fed/update_norms", norms, step))
        for client, part in figures.merged.items():
            report = part.report
            own = {
                "train/loss": report.loss_last,
                "train/tok_per_sec": report.tokens_per_second,
                "fed/steps": report.steps,
                "fed/train_seconds": report.training_seconds,
                "fed/update_norm": part.length.norm,
                "fed/update_scale": part.scale,
                "fed/bytes_up": figures.client_bytes_up,
                "fed/bytes_down": figures.client_bytes_down[client],
                "fed/events_total": events.total(client=client),
                "fed/cosine_to_merged": part.cosine,
            }
            self._scalars(client, own, step)
        who = f"{len(figures.merged)} of {figures.asked} clients"
        if figures.in_flight > 1:
            who = ", ".join(f"{client}, {part.age} merges late" for client, part in figures.merged.items())
        logger.info(
            "round %3d  %s  %8.2f M tokens  %s steps  train loss %.3f  %7.1f s",
            figures.round,
            who,
            tokens / 1e6,
            "+".join(str(part.report.steps) for part in figures.merged.values()),
            loss,
            self.summary.seconds,
        )

    def validation(
        self, point: Point, *, step: int, seconds: float, sites: Mapping[str, float] | None = None, silent: int = 0
    ) -> None:
        """Write bits per byte after a round: against optimizer steps, as the vanilla path does, tokens and seconds.

        Args:
            point: the round, its tokens and seconds of training, and the bits per byte.
            step: optimizer steps of the run by then.
            seconds: how long the evaluation took.
            sites: the bits per byte of each client's own text, where clients evaluated.
            silent: how many clients were asked and gave no figure.
        """
        sites = sites or {}
        self.summary.add(point)
        self._scalars("", {"fed/evaluate_seconds": seconds}, step)
        self._try(lambda: write_point(self._writer(""), point, step))
        for client, bpb in sites.items():
            self._scalars(client, {"val/bpb": bpb}, step)
            self._scalars(client, {"bpb/by_tokens": bpb}, point.tokens)
        named = [f"{client} {bpb:.4f}" for client, bpb in sorted(sites.items())[:MAX_NAMED]]
        named += [f"{len(sites) - MAX_NAMED} more"] if len(sites) > MAX_NAMED else []
        by_site = f" ({', '.join(named)}{f'; {silent} without a figure' if silent else ''})" if sites else ""
        logger.info(
            "round %3d  %21.2f M tokens  val %.4f bits per byte%s", point.step, point.tokens / 1e6, point.bpb, by_site
        )
        self.save()

    def core(self, score: CoreScore, point: Point, *, step: int) -> None:
        """Write CORE after a round, and a line of the log.

        Args:
            score: CORE with its tasks.
            point: the round, and its tokens.
            step: optimizer steps of the run by then.
        """
        self._try(lambda: write_scalars(self._writer(""), score, step, point.tokens))
        logger.info("round %3d  %21.2f M tokens  %s", point.step, point.tokens / 1e6, score.line())
        self.save()

    def text(self, prompt: str, sample: str, step: int) -> None:
        """Write a text sample."""
        self._try(lambda: self._writer("").add_text(f"sample/{plain(prompt, 40)}", sample, step))

    def describe(self) -> None:
        """Write the run's config and how TensorBoard lays its curves out, at each start."""
        self._try(lambda: describe(self._writer(""), self._run))

    def _scalars(self, client: str, scalars: Mapping[str, float], step: int) -> None:
        if client not in self._writers and len(self._writers) > MAX_SITES:
            return

        def write() -> None:
            for tag, value in scalars.items():
                self._writer(client).add_scalar(tag, value, step)

        self._try(write)

    def _writer(self, client: str) -> SummaryWriter:
        if client not in self._writers:
            writer: Any = SummaryWriter(str(self._run / SITES / client if client else self._run))
            if not client and (wandb := self._wandb_run()) is not None:
                writer = MirroredWriter(writer, wandb)
            self._writers[client] = writer
        return self._writers[client]

    def _wandb_run(self) -> WandbRun | None:
        """Return the run at Weights & Biases; a federation that goes on does so without, where it cannot be reached."""
        if self._wandb is None and self._options.wandb_project and not self._wandb_is_lost:
            try:
                self._wandb = WandbRun(self._options)
            except NanofedError as error:
                if not self.summary.curve:
                    raise
                self._wandb_is_lost = True
                logger.warning("the figures do not go to Weights & Biases until the next start: %s", error)
        return self._wandb

    def _try(self, write: Callable[[], object]) -> None:
        """Write, and where that fails say so once; the next round opens the files anew."""
        if not self._attempt(write):
            self._writers.clear()

    def save(self) -> None:
        """Write events and summary to disk."""
        for writer in list(self._writers.values()):
            self._try(writer.flush)
        self._try(lambda: self.summary.write(self._run))

    def close(self) -> None:
        """Close the event files."""
        self.save()
        for writer in list(self._writers.values()):
            self._try(writer.close)
        if self._wandb is not None:
            self._wandb.finish(self.summary)
