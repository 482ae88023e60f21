"""What a benchmark runs on: its name and versions, its clocks and its memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("data", "forward", "backward", "optimizer", "logging")


def cpu_name() -> str:
    """Return the processor's name and its widest vector units for matmuls."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    units = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_amx_tile_supported():
        units += "+AMX"
    elif torch.cpu._is_avx512_bf16_supported():
        units += "+BF16"
    return f"{name} ({units})"


def describe(device: torch.device) -> dict[str, Any]:
    """Return hardware, versions, commit and load: what a figure is worth nothing without."""
    hardware: dict[str, Any] = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    versions = {name: version(name) for name in ("torch", "lightning", "numpy")}
    versions["python"] = platform.python_version()
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return {
        "hardware": hardware,
        "versions": versions,
        "commit": commit(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def commit() -> str | None:
    """Return the checkout's commit, with a plus where files have changed since; None outside of git."""
    if not (ROOT / ".git").exists():
        return None
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False).returncode
    return head.stdout.strip() + ("+" if changed else "")


class Laps:
    """Times the phases of steps on several clocks at once, and waits for nothing until it is read.

    `wall` is the wall clock, on CUDA that of the device's stream (events); `cpu` is the CPU time of this whole process,
    which other processes on the machine hardly touch; `host` is the wall clock of the Python thread, which on CUDA runs
    ahead of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
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
                steps.append({clock: dict.fromkeys(PHASES, 0.0) for clock in ("wall", "cpu", "host")})
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


def reset_peak_memory(device: torch.device) -> None:
    """Let the high-water mark begin at what is in use now.

    Raises:
        OSError: the kernel does not let a process reset its mark (/proc/self/clear_refs).
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Return the high-water mark since the last reset in MB (10^6): allocated on CUDA, resident in this process on CPU.

    Other systems than Linux cannot reset the mark of resident memory: there it is that of the process's whole life.
    """
    if device.type == "cuda":
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return _status_mb("VmHWM")


def resident_memory_mb() -> float:
    """Return this process's resident memory in MB (Linux)."""
    return _status_mb("VmRSS")


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {field}")
