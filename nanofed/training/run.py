"""A run's folder: config, checkpoints, TensorBoard events and a summary, the same for both paths."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanofed.errors import ConfigError, NanofedError
from nanofed.files import write_atomically
from nanofed.training.checkpoint import checkpoints, find_checkpoint, newest_whole
from nanofed.training.options import RunOptions

CONFIG = "config.yaml"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Point:
    """One validation: bits per byte after `tokens` tokens and `seconds` seconds of training."""

    step: int
    tokens: int
    seconds: float
    bpb: float


@dataclass
class Summary:
    """What a run came to.

    Attributes:
        name: of the run.
        kind: `fit` or `federated`.
        tokens: trained, over all ranks and clients.
        seconds: of training, on this machine's clock.
        curve: every validation, the first before training.
    """

    name: str
    kind: str
    tokens: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)

    @property
    def bpb_start(self) -> float | None:
        """Bits per byte before training."""
        return self.curve[0].bpb if self.curve else None

    @property
    def bpb_end(self) -> float | None:
        """Bits per byte at the end."""
        return self.curve[-1].bpb if self.curve else None

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
            return cls(content["name"], content["kind"], content["tokens"], content["seconds"], curve)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{run} has no readable {SUMMARY}: is it a run folder? ({error})") from error


def is_used(run: Path) -> bool:
    """Tell whether a folder holds a run."""
    return (run / CONFIG).exists() or bool(checkpoints(run))


def check_unused(options: RunOptions) -> None:
    """Refuse a folder that holds a run when neither resuming nor overwriting is asked."""
    if is_used(options.folder) and not (options.overwrite or options.ckpt_path):
        raise ConfigError(
            f"{options.folder} already holds a run: go on with --ckpt_path last, choose another --name, or pass "
            "--overwrite true"
        )


def open_run(options: RunOptions, config: str) -> Path:
    """Return the run's folder, made if it is new, with the resolved config saved in it.

    Raises:
        ConfigError: the folder holds a run and neither resuming nor overwriting is asked.
        NanofedError: the folder cannot be written.
    """
    run = options.folder
    check_unused(options)
    try:
        if options.overwrite and is_used(run):
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(run / CONFIG, config)
    except OSError as error:
        raise NanofedError(
            f"the run folder {run} cannot be written: {error.strerror}; choose another --runs_dir"
        ) from error
    return run


def resume_checkpoint(run: Path, ckpt_path: str | None) -> Path | None:
    """Return the checkpoint that `--ckpt_path` names: `last` is the run's newest that verifies, nothing if it has none yet.

    Raises:
        ConfigError: there is none of that name, or it is a URL.
        CheckpointError: the run has checkpoints, and all of them are damaged.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        return newest_whole(run)
    return find_checkpoint(ckpt_path)
