"""Where the seconds of training steps go: phases timed on several clocks, on a device too."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

PHASES = ("data", "forward", "backward", "optimizer", "logging")


class Laps:
    """Times the phases of steps on several clocks at once, and waits for nothing until it is read.

    `wall` is the wall clock, on CUDA that of the device's stream (events); `cpu` is the CPU time of this whole process,
    which other processes on the machine hardly touch; `host` is the wall clock of the Python thread, which on CUDA runs
    ahead of the device.

    Args:
        device: The device that computes the steps.
        phases: The names of the phases; a phase that a step does not have takes no time in it.
    """

    def __init__(self, device: torch.device, phases: Sequence[str] = PHASES) -> None:
        self._device = device
        self._phases = phases
        self._marks: list[tuple[str | None, float, float, torch.cuda.Event | None]] = []

    def start(self) -> None:
        """Begin a step."""
        self._mark(None)

    def lap(self, phase: str) -> None:
        """End a phase, which began where the last one ended."""
        self._mark(phase)

    def _mark(self, phase: str | None) -> None:
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        self._marks.append((phase, time.perf_counter(), time.process_time(), event))

    def read(self) -> list[dict[str, dict[str, float]]]:
        """Return each step's seconds by clock and phase, and forget them; waits for the device."""
        synchronize(self._device)
        steps: list[dict[str, dict[str, float]]] = []
        for index, (phase, host, cpu, event) in enumerate(self._marks):
            if phase is None:
                steps.append({clock: dict.fromkeys(self._phases, 0.0) for clock in ("wall", "cpu", "host")})
                continue
            _, host_before, cpu_before, event_before = self._marks[index - 1]
            on_host = host - host_before
            seconds = steps[-1]
            seconds["host"][phase] += on_host
            seconds["cpu"][phase] += cpu - cpu_before
            # micro-batches of a step add up
            seconds["wall"][phase] += event_before.elapsed_time(event) / 1e3 if event and event_before else on_host
        self._marks.clear()
        return steps


def synchronize(device: torch.device) -> None:
    """Wait for all that the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
