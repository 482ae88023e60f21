"""Memory of many processes that come and go: sampled from /proc, by what they are."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Self

PROC = Path("/proc")
INTERVAL = 0.2
KINDS = {  # first match in the command line
    "flower-superlink": "superlink",
    "flwr-serverapp": "serverapp",
    "flower-supernode": "supernode",
    "flower-superexec": "superexec",
    "flwr-clientapp": "clientapp",
    "nanofed.federated.site.bundle": "clientapp",
    "echo_trainer": "trainer",
    "nanofed.federated.site.service": "trainer",
    "nanofed.federated.server.proxy": "proxy",
    "echo_site": "supervisors",
    "nanofed site": "supervisors",
    "nanofed server": "supervisors",
    "/flwr ": "flwr command",
}


def kind(command: str) -> str:
    """Return what a command line starts."""
    return next((name for part, name in KINDS.items() if part in command), "other")


class Sampler:
    """Samples every process that was started with a mark in its environment, until the block ends.

    Attributes:
        peaks: kind -> the largest resident memory that one such process ever had, in MB (10^6).
        together: the most that all had at one time: their private memory, the files in memory between them counted once.
    """

    def __init__(self, mark: str) -> None:
        self.peaks: dict[str, float] = defaultdict(float)
        self.together = 0.0
        self._mark = mark.encode()
        self._ours: dict[int, bool] = {}
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
                self.peaks[name] = max(self.peaks[name], status["VmHWM"])
                private += status["RssAnon"] + status["RssFile"]
        self.together = max(self.together, private + max(0.0, _shared() - self._shared_before))


def _shared() -> float:
    return _megabytes(PROC / "meminfo")["Shmem"]


def _megabytes(file: Path) -> dict[str, float]:
    """Return the fields of a file that are given in kB, in MB (10^6)."""
    rows = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 / 1e6 for row in rows if len(row) == 3 and row[2] == "kB"}
