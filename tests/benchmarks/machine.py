"""What a benchmark runs on: its name and versions, its clocks and its memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nanofed.training.laps import synchronize

ROOT = Path(__file__).resolve().parents[2]


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
