"""The options that every run has, on either path."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nanofed import runtime
from nanofed.errors import ConfigError
from nanofed.ranges import Count, CountOrZero, check_numbers

START = ("overwrite", "force", "ckpt_path", "init_from")  # say how one command starts: no part of what a run saves
LONGEST_NAME = 200  # of 255 bytes: files beside a run are called after it


@dataclass
class RunOptions:
    """Options of a run, on either path; a federated run counts rounds where a fit counts optimizer steps.

    Attributes:
        name: the run's folder is `runs_dir`/`name`.
        runs_dir: folder of all runs; TensorBoard reads it.
        overwrite: replace a run of that name; heeded on the command line only, never in a file.
        force: start where the memory does not seem to be enough, or where the config of a resumed run differs.
        ckpt_path: `last` goes on with the run of that name, or starts it anew where it has no checkpoint yet; or a checkpoint.
        init_from: start from the weights of another run or checkpoint, of either path.
        eval_every: steps (rounds) between two validations.
        save_every: steps (rounds) between two checkpoints; 0 saves at the end only.
        keep_checkpoints: newest checkpoints to keep; 0 keeps all.
        keep_every: checkpoints at multiples of so many steps (rounds) are kept besides; 0 for none.
        log_every: steps between two entries of the training loss.
        deterministic: compute the same bits each time on a GPU too, for which it takes slower kernels.
        sample_every: steps (rounds) between two text samples, taken at validations; 0 takes none.
        sample_prompts: what the samples go on from.
        wandb_project: project at Weights & Biases that gets the figures of TensorBoard too; by default none does. In a federation
            the server sends them, and the sites nothing.
        run_name: what the run is called there; by default its `name`.
        core_every: steps (rounds) between two measurements of CORE, taken after validations; 0 takes none.
        core_data: the bundle of CORE's tasks; by default the one that `nanofed data download --core` brings.
        core_examples: examples to ask of each task, the first ones; 0 asks all. nanochat asks 500 while it trains.
    """

    name: str = "run"
    runs_dir: str = "runs"
    overwrite: bool = False
    force: bool = False
    ckpt_path: str | None = None
    init_from: str | None = None
    eval_every: Count = 250
    save_every: CountOrZero = 1000
    keep_checkpoints: CountOrZero = 2
    keep_every: CountOrZero = 0
    log_every: Count = 10
    deterministic: bool = False
    sample_every: CountOrZero = 0
    sample_prompts: list[str] = field(default_factory=lambda: ["The capital of France is", "To open a file,"])
    wandb_project: str | None = None
    run_name: str | None = None
    core_every: CountOrZero = 0
    core_data: str | None = None
    core_examples: CountOrZero = 500

    def __post_init__(self) -> None:
        """Refuse intervals that are none."""
        check_numbers(self, "--")
        if not self.name or Path(self.name).name != self.name or self.name == "..":
            raise ConfigError(f"--name {self.name[:80]!r} is not a plain folder name")
        if not self.name.isprintable() or len(self.name.encode()) > LONGEST_NAME:
            raise ConfigError(
                f"--name {self.name[:80]!r} cannot name a folder everywhere: up to {LONGEST_NAME} bytes of printable characters"
            )
        if "://" in self.runs_dir:
            raise ConfigError(f"--runs_dir {self.runs_dir} is a URL: runs are kept in local folders only")
        if self.core_every % self.eval_every:
            raise ConfigError(
                f"--core_every {self.core_every}: CORE is measured after a validation: take a multiple of --eval_every "
                f"({self.eval_every})"
            )
        if self.overwrite and self.ckpt_path:
            raise ConfigError("--overwrite true would delete the run that --ckpt_path goes on with: give one of them")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return runtime.user_path(self.runs_dir) / self.name
