"""Where the time of an optimizer step of `fit` goes: some steps of the Trainer are timed, then as many are traced."""

from __future__ import annotations

import logging
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.profilers import Profiler

from nanofed import runtime
from nanofed.errors import ConfigError, NanofedError
from nanofed.training.callbacks.stopping import take_signals
from nanofed.training.gemm import ceiling
from nanofed.training.laps import Laps
from nanofed.training.memory import Place, check_memory
from nanofed.training.module import GPTModule
from nanofed.training.recipe import accumulation_steps

if TYPE_CHECKING:
    from nanofed.training.lightning_cli import FitCLI

logger = logging.getLogger(__name__)

PHASES = ("data", "forward", "backward", "optimizer", "rest")
# What Lightning calls the parts of a step, by the end of the name -> the phase that ends with it.
ACTIONS = {
    "train_dataloader_next": "data",
    "batch_to_device": "data",
    "training_step": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
}
MOST_OPERATORS = 12
COLLECTIVES = ("nccl", "gloo:", "mpi:")  # how the names of collectives in a trace begin


@dataclass(frozen=True)
class Operator:
    """An operator's part in a step: how often it ran, and its seconds without those of the operators that it called."""

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class StepProfile:
    """What an optimizer step is spent on, on the first rank."""

    steps: int  # the number of steps that were timed; as many were traced
    tokens: int  # the tokens of a step, over all ranks
    seconds: float  # the median time of a step in seconds, without tracing
    # The median seconds of each phase of a step, by its name; `rest` is the time of the loop and the callbacks.
    phases: dict[str, float]
    traced_seconds: float  # the median time of a traced step in seconds; tracing makes steps slower
    # The seconds of a traced step in collectives, with the time in which they wait for other ranks. They may overlap with
    # computation and with each other.
    collectives: float
    operators: list[Operator]  # the operators in which a traced step spends most of its time
    ceiling: float  # the FLOP/s that the fastest of the model's matmuls reaches by itself on one rank
    share: float  # the part of the ceiling that a step reaches on each rank
    trace: Path

    def text(self) -> str:
        """Return the profile as a table for a terminal."""
        lines = [
            f"a step of {self.tokens:,} tokens takes {self.seconds * 1e3:,.1f} ms (median of {self.steps}): "
            f"{self.tokens / self.seconds:,.0f} tok/s, {self.share:.1%} of the matmul ceiling, {self.ceiling / 1e9:,.0f} GFLOP/s",
            "",
            f"{'phase':<44}{'ms a step':>10}{'share':>8}",
            *(_row(name, seconds, self.seconds) for name, seconds in self.phases.items()),
            "",
            f"{f'operator, traced ({self.traced_seconds * 1e3:,.1f} ms a step)':<44}{'ms a step':>10}{'share':>8}{'calls':>8}",
            _row("all collectives", self.collectives, self.traced_seconds),
            *(f"{_row(o.name, o.seconds, self.traced_seconds)}{o.calls:>8,.0f}" for o in self.operators),
            "",
            f"trace: {self.trace} (open it at https://ui.perfetto.dev or chrome://tracing)",
        ]
        return "\n".join(lines)


def _row(name: str, seconds: float, whole: float) -> str:
    return f"{name[:43]:<44}{seconds * 1e3:>10,.2f}{seconds / whole:>8.1%}"


class StepProfiler(Profiler):
    """A profiler for Lightning's Trainer, which tells it of every part of a step: it times some steps and traces the others.

    Args:
        device: The device that computes the steps.
        accumulation: The number of micro-batches of a step.
        warm_up: The number of steps before the first one that is timed.
        steps: The number of steps that are timed before tracing begins.

    Attributes:
        timed: The seconds of each timed step, by phase.
        trace: The trace under way; the caller has to stop it.
    """

    def __init__(self, device: torch.device, accumulation: int, warm_up: int, steps: int) -> None:
        super().__init__()
        self.timed: list[dict[str, float]] = []
        self.trace = torch.profiler.profile()
        self._laps = Laps(device, PHASES)
        self._accumulation = accumulation
        self._warm_up, self._steps = warm_up, steps
        self._batches = 0
        self._spans: dict[str, Any] = {}  # phase -> its span in the trace

    def start(self, action_name: str) -> None:
        """Begin a part of a step; the time between two parts belongs to the phase `rest`."""
        action = action_name.rpartition(".")[2]
        if action not in ACTIONS:
            return
        if action != "train_dataloader_next":
            self._laps.lap("rest")
        else:
            self._next_batch()
        if action != "optimizer_step":  # which holds forward and backward of the last micro-batch
            self._open(ACTIONS[action])

    def stop(self, action_name: str) -> None:
        """End a part of a step, and with it the phase."""
        action = action_name.rpartition(".")[2]
        if action not in ACTIONS:
            return
        phase = ACTIONS[action]
        self._laps.lap(phase)
        self._close(phase)
        if action == "backward" and self._batches % self._accumulation == 0:
            self._open("optimizer")

    def _next_batch(self) -> None:
        step, within = divmod(self._batches, self._accumulation)
        self._batches += 1
        if step or within:
            self._laps.lap("rest")
        if within:
            return
        if step == self._warm_up:
            self._laps.read()
        elif step == self._warm_up + self._steps:
            self.timed = [clocks["wall"] for clocks in self._laps.read()]
            self.trace.start()
        self._laps.start()

    def traced(self) -> list[dict[str, float]]:
        """Return the seconds of each traced step by phase; call it once, at the end."""
        return [clocks["wall"] for clocks in self._laps.read()]

    def _open(self, phase: str) -> None:
        self._spans[phase] = torch.profiler.record_function(phase)
        self._spans[phase].__enter__()

    def _close(self, phase: str) -> None:
        if (span := self._spans.pop(phase, None)) is not None:
            span.__exit__(None, None, None)


def run_profile(cli: FitCLI, trace: Path, *, warm_up: int, steps: int) -> StepProfile | None:
    """Train for `warm_up + 2 * steps` optimizer steps of what the CLI has built, and keep nothing of it but the trace.

    The first steps warm up; then come those that are timed, and those that are traced. The first rank writes the trace in
    Chrome's format; the other ranks return None.

    Args:
        cli: The parsed command.
        trace: The path of the trace; it is compressed where the name ends in `.gz`.
        warm_up: The number of steps that are neither timed nor traced, in which the model is compiled.
        steps: The number of steps that are timed, and of those that are traced.

    Raises:
        ConfigError: The batch does not divide into micro-batches, or the memory is too small.
        DataError: There are no shards, or there is no tokenizer.
    """
    module: GPTModule = cli.model
    data, trainer, place = cli.datamodule, cli.trainer, Place.of(cli.trainer)
    tokens = module.recipe.batch_tokens
    accumulation = accumulation_steps(
        tokens, device_batch_size=data.device_batch_size, sequence_len=data.sequence_len, world_size=place.ranks
    )
    if runtime.is_first_rank():
        check_memory(module, data, place, batch_tokens=tokens, force=cli.run_options.force)
    trainer.accumulate_grad_batches = accumulation
    trainer.val_check_interval = sys.maxsize
    trainer.fit_loop.epoch_loop.max_steps = warm_up + 2 * steps
    profiler = StepProfiler(place.device, accumulation, warm_up, steps)
    trainer.profiler = profiler  # type: ignore[attr-defined]
    take_signals(trainer)
    with cli.watchdog.over(trainer), cli.lightning_errors(), cli.garbage:
        trainer.fit(module, datamodule=data)
        traced = profiler.traced()
        profiler.trace.stop()
    if not profiler.timed or len(traced) < steps:
        raise ConfigError(f"the Trainer ended before {warm_up + 2 * steps} steps were done: leave its limits out")
    if not runtime.is_first_rank():
        return None
    try:
        if trace.is_file():  # and not /dev/null
            trace.unlink()
        profiler.trace.export_chrome_trace(str(trace))
    except OSError as error:
        raise NanofedError(f"the trace cannot be written to {trace}: {error.strerror or error}") from error
    if not trace.exists():  # PyTorch only logs why
        raise NanofedError(f"the trace cannot be written to {trace}")
    events = profiler.trace.key_averages()
    on_cpu = place.device.type == "cpu"

    def seconds(event: Any) -> float:
        return float(event.self_cpu_time_total if on_cpu else event.self_device_time_total) / 1e6 / steps

    # A collective of gloo's is on no thread of the trace: its time is that from the call to the end.
    moved = [e for e in events if e.key.lower().startswith(COLLECTIVES)]
    computed = [e for e in events if e.device_type.name == "CPU" and not e.is_user_annotation]
    rates = ceiling(module.config, data.device_batch_size * data.sequence_len, module.gpt.compute_dtype, place.device)
    step = statistics.median(sum(phases.values()) for phases in profiler.timed)
    return StepProfile(
        steps=steps,
        tokens=tokens,
        seconds=step,
        phases={phase: statistics.median(phases[phase] for phases in profiler.timed) for phase in PHASES},
        traced_seconds=statistics.median(sum(phases.values()) for phases in traced),
        collectives=sum(e.cpu_time_total / 1e6 / steps if on_cpu else seconds(e) for e in moved),
        operators=[
            Operator(e.key, e.count / steps, seconds(e))
            for e in sorted(computed, key=seconds)[: -MOST_OPERATORS - 1 : -1]
        ],
        ceiling=rates["best"]["wall"],
        share=module.config.flops_per_token() * tokens / place.ranks / step / rates["best"]["wall"],
        trace=trace,
    )
