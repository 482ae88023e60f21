"""The memory that a process may still take: of its GPU, or of the machine and the control groups that it is in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch


def available_bytes(device: torch.device, *, sharing: int = 1, root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may have on a device, None where the machine does not tell (macOS).

    On CUDA what the device has free. On CPU what Linux calls available, but no more than the least of what its control
    groups leave, divided among the processes that share it; what this process holds already counts as its own.

    Args:
        device: cpu or cuda; for any other the answer is None.
        sharing: processes on this machine that need as much, this one among them.
        root: where `proc` and `sys` lie.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    available = _field(root / "proc/meminfo", "MemAvailable")
    if available is None:
        return None
    held = _field(root / "proc/self/status", "VmRSS") or 0
    return (min([available, *_left_in_groups(root)]) + held) // sharing


def _field(file: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what every control group above this process has left of its limit; page cache that can go counts as free.

    Version 2: `0::/path`, `memory.max`, `memory.current`. Version 1: `4:memory:/path`, `memory.limit_in_bytes`, ….
    Inside a container the path may be of the host's view: then the mounted root is the container's own group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inactive = "total_inactive_file" if controllers else "inactive_file"
        group = PurePosixPath(path.lstrip("/"))
        for folder in (base / group, *(base / parent for parent in group.parents)):
            try:
                limit, usage = ((folder / name).read_text().strip() for name in names)
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit != "max":  # version 1 writes a number beyond all memory for none
                yield max(0, int(limit) - int(usage) + int(stat.get(inactive, "0")))
