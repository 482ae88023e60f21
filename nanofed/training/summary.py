"""What a run came to: the curve of its validations and its totals, the same for both paths."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanofed.errors import ConfigError
from nanofed.files import write_atomically

CONFIG = "config.yaml"
SUMMARY = "summary.json"
MARKER = "nanofed-run.json"  # makes a folder a run of nanofed's (run_folder.py)
AT_HORIZON = "the horizon is reached"


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
    """

    name: str
    kind: str
    tokens: int = 0
    seconds: float = 0.0
    bytes: int = 0
    curve: list[Point] = field(default_factory=list)
    ended: str | None = None

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
            return cls(**totals, bytes=content.get("bytes", 0), curve=curve, ended=content.get("ended"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{run} has no readable {SUMMARY}: is it a run folder? ({error})") from error
