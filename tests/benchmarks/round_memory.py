"""Memory and CPU time of many processes that come and go: sampled from /proc, by what they are."""

from __future__ import annotations

import bisect
import contextlib
import os
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Self

PROC = Path("/proc")
INTERVAL = 0.2
TICKS = os.sysconf("SC_CLK_TCK")
KINDS = {  # first match in the command line
    "nanofed.federated.deploy.superlink_process": "superlink",
    "flwr-serverapp": "serverapp",
    "flower-superlink": "superlink",  # stock
    "nanofed.federated.deploy.supernode": "supernode",
    "flower-supernode": "supernode",  # stock
    "flower-superexec": "superexec",
    "flwr-clientapp": "clientapp",  # stock
    "echo_rounds": "worker",
    "nanofed.federated.site.worker": "worker",
    "echo_site": "supervisors",
    "nanofed site": "supervisors",
    "nanofed server": "supervisors",
    "/flwr ": "flwr command",
}


def kind(command: str) -> str:
    """Return what a command line starts."""
    return next((name for part, name in KINDS.items() if part in command), "other")


class Sampler:
    """Samples every process that was started with a mark in its environment, until the block ends; memory in MB (10^6)."""

    def __init__(self, mark: str) -> None:
        self.peaks: dict[str, float] = defaultdict(float)  # kind -> the largest resident memory of one such process
        self.together = 0.0  # the most that all had at one time: private memory, files in memory counted once
        self._mark = mark.encode()
        self._ours: dict[int, bool] = {}
        self._cpu: dict[int, tuple[str, float]] = {}  # process, dead ones too -> its kind, CPU seconds when last seen
        self._history: list[tuple[float, dict[str, float]]] = []
        self._shared_before = _shared()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def cpu_between(self, start: float, stop: float) -> dict[str, float]:
        """Return CPU seconds by kind between two times of the monotonic clock; what ends between two samples is cut short."""
        times = [when for when, _ in self._history]
        first, last = (self._history[min(bisect.bisect(times, t), len(times) - 1)][1] for t in (start, stop))
        return {name: seconds - first.get(name, 0.0) for name, seconds in sorted(last.items())}

    def _run(self) -> None:
        while not self._end.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        pids = {int(folder.name) for folder in PROC.glob("[0-9]*")}
        self._ours = {pid: ours for pid, ours in self._ours.items() if pid in pids}
        private = 0.0
        for pid in pids:
            with contextlib.suppress(OSError):  # gone by now
                folder = PROC / str(pid)
                if pid not in self._ours:
                    self._ours[pid] = self._mark in (folder / "environ").read_bytes().split(b"\0")
                if not self._ours[pid]:
                    continue
                command = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                status = _megabytes(folder / "status")
                if "VmHWM" not in status:
                    continue  # it has ended
                name = kind(command)
                fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
                self._cpu[pid] = name, (int(fields[11]) + int(fields[12])) / TICKS
                self.peaks[name] = max(self.peaks[name], status["VmHWM"])
                private += status["RssAnon"] + status["RssFile"]
        totals: dict[str, float] = defaultdict(float)
        for name, seconds in self._cpu.values():
            totals[name] += seconds
        self._history.append((time.monotonic(), totals))
        self.together = max(self.together, private + max(0.0, _shared() - self._shared_before))


def _shared() -> float:
    return _megabytes(PROC / "meminfo")["Shmem"]


def _megabytes(file: Path) -> dict[str, float]:
    """Return the fields of a file that are given in kB, in MB (10^6)."""
    rows = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 / 1e6 for row in rows if len(row) == 3 and row[2] == "kB"}
