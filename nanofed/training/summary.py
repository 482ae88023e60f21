"""What a run came to: the curve of its validations and its totals, the same for both paths."""

from __future__ import annotations

import html
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanofed.errors import ConfigError
from nanofed.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONFIG = "config.yaml"
SUMMARY = "summary.json"
MARKER = "nanofed-run.json"  # makes a folder a run of nanofed's (run_folder.py)
AT_HORIZON = "the horizon is reached"
UNITS = {"tokens": "tokens", "seconds": "seconds of training", "bytes": "bytes sent"}  # what a curve can be drawn by


@dataclass(frozen=True)
class Point:
    """One validation: bits per byte after `tokens` tokens and `seconds` seconds of training.

    Attributes:
        step: Optimizer steps so far, in a federation rounds.
        tokens: Tokens trained so far, over all ranks and clients.
        seconds: Seconds of training so far.
        bpb: Bits per byte.
        bytes: Bytes of weights and updates that were sent so far, to and from all clients; 0 on one machine.
    """

    step: int
    tokens: int
    seconds: float
    bpb: float
    bytes: int = 0


@dataclass
class Summary:
    """What a run came to.

    Attributes:
        name: the run's name.
        kind: `fit` or `federated`.
        tokens: tokens trained, over all ranks and clients.
        seconds: seconds of training, on this machine's clock.
        bytes: bytes of weights and updates that were sent, to and from all clients.
        curve: every validation, the first before training.
        ended: why the run has ended; None while it goes on, and where a power cut or a SIGKILL ended it.
        init_from: the run or checkpoint whose weights it began with; None where they were drawn.
    """

    name: str
    kind: str
    tokens: int = 0
    seconds: float = 0.0
    bytes: int = 0
    curve: list[Point] = field(default_factory=list)
    ended: str | None = None
    init_from: str | None = None

    @property
    def bpb_start(self) -> float | None:
        """Bits per byte before training."""
        return self.curve[0].bpb if self.curve else None

    @property
    def bpb_end(self) -> float | None:
        """Bits per byte at the end."""
        return self.curve[-1].bpb if self.curve else None

    @property
    def ended_early(self) -> str | None:
        """Why the run ended before its horizon, None where it did not or is not known to have."""
        return None if self.ended == AT_HORIZON else self.ended

    def add(self, point: Point) -> None:
        """Record a validation; one at a step that is there already replaces it (a resumed run repeats its last)."""
        self.curve = [p for p in self.curve if p.step < point.step] + [point]

    def plot(self, by: Literal["tokens", "seconds", "bytes"] = "tokens", axes: Axes | None = None) -> Axes:
        """Draw the curve, bits per byte by tokens, seconds or bytes sent, and return the axes, on which other runs can follow.

        Args:
            by: The axis that goes across.
            axes: Where to draw; by default a new figure.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        if axes is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ConfigError("a plot needs matplotlib, which comes with the extra `notebooks`") from error
            axes = pyplot.subplots()[1]
        axes.plot(
            [getattr(point, by) for point in self.curve], [p.bpb for p in self.curve], marker=".", label=self.name
        )
        axes.set(xlabel=UNITS[by], ylabel="bits per byte")
        axes.legend()
        return axes

    def _repr_html_(self) -> str:
        """Return the totals as a table, which notebooks show."""
        ends = [f"{bpb:.4f}" if bpb is not None else "not measured" for bpb in (self.bpb_start, self.bpb_end)]
        cells = {
            "run": self.name, "kind": self.kind, "tokens": f"{self.tokens:,}", "seconds": f"{self.seconds:.1f}",
            "MB sent": f"{self.bytes / 1e6:.1f}", "bits per byte, before": ends[0], "after": ends[1], "ended": self.ended or "",
        }  # fmt: skip
        head, row = (
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
            for tag, line in (("th", cells), ("td", cells.values()))
        )
        return f"<table><tr>{head}</tr><tr>{row}</tr></table>"

    def write(self, run: Path) -> None:
        """Write `summary.json` atomically."""
        content = {**asdict(self), "bpb_start": self.bpb_start, "bpb_end": self.bpb_end}
        write_atomically(run / SUMMARY, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, run: Path) -> Summary:
        """Read a run's `summary.json`."""
        try:
            content = json.loads((run / SUMMARY).read_text())
            curve = [Point(**point) for point in content["curve"]]
            totals = {key: content[key] for key in ("name", "kind", "tokens", "seconds")}
            later = {"bytes": content.get("bytes", 0), "init_from": content.get("init_from")}  # than the first version
            return cls(**totals, **later, curve=curve, ended=content.get("ended"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{run} has no readable {SUMMARY}: is it a run folder? ({error})") from error
