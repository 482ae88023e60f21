"""The other ranks of a run: whether those on this node live, and what any rank says it failed with."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from nanofed import runtime

# In the ranks' store:
FAILED = "nanofed/failed"  # the first failure, by which all of them end
HEARD = "nanofed/heard"  # how many ranks know of it
POLL = 0.5  # seconds between two looks
JOIN_SECONDS = 10.0  # a store that never answers must not hold up the end of the run


@dataclass(frozen=True)
class Failure:
    """Why a run ends: the rank that says so, the exit code for all, and one line."""

    by: int
    code: int
    message: str


class Peers:
    """What one rank knows of the others.

    Args:
        trainer: a Trainer with more than one rank. Ranks that Lightning's own launcher has started are watched from the
            start on, all others from `join` on.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.rank = trainer.global_rank
        self._ranks = trainer.world_size
        self._launcher: Any = trainer.strategy.launcher
        self._pids: dict[int, int] = {}  # of the other ranks on this node
        self._store: Any = None
        self._mine: Failure | None = None
        self._heard: Failure | None = None
        self._wake, self._answered, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._listener = threading.Thread(target=self._listen, name="nanofed-peers", daemon=True)

    @property
    def children(self) -> list[subprocess.Popen[bytes]]:
        """The ranks that this one has launched: those of its node, on the first rank under Lightning's own launcher."""
        return list(getattr(self._launcher, "procs", ()))

    def join(self, trainer: Trainer) -> None:
        """Meet the other ranks, once the process group is there; every rank calls it.

        Process ids count where they mean the same: on the same node, in the same namespace of process ids.
        """
        if self._store is not None:
            return
        store: Any = dist.distributed_c10d._get_default_store()
        space = Path("/proc/self/ns/pid")
        here = [trainer.node_rank, socket.gethostname(), str(space.readlink()) if space.exists() else ""]
        store.set(f"nanofed/pid/{self.rank}", json.dumps([*here, os.getpid()]))
        for rank in range(trainer.world_size):
            *there, pid = json.loads(store.get(f"nanofed/pid/{rank}"))  # waits for it
            if rank != self.rank and there == here:
                self._pids[rank] = pid
        self._store = store.clone()  # a connection of its own: the main thread may be waiting on the other one
        self._listener.start()

    def _listen(self) -> None:
        # A store whose rank is stopped answers nothing, for good: only this thread may wait for it.
        while not self._closed.is_set():
            try:
                if self._mine is not None and self._heard is None:
                    said = self._store.compare_set(FAILED, "", json.dumps(asdict(self._mine)))
                    self._heard = Failure(**json.loads(said))
                elif self._store.check([FAILED]):
                    self._heard = Failure(**json.loads(self._store.get(FAILED)))
            except RuntimeError:
                if not self._closed.is_set():
                    self._heard = Failure(self.rank, 1, "the rank that keeps the ranks' store has gone")
            if self._heard is not None:
                with contextlib.suppress(RuntimeError):
                    self._store.add(HEARD, 1)
                self._answered.set()
                return
            self._wake.wait(POLL)

    def failure(self) -> Failure | None:
        """Return what another rank has failed with, or that one on this node has died."""
        return self._heard or self._died()

    def _died(self) -> Failure | None:
        children = self.children
        for local_rank, child in enumerate(children, start=1):
            code = child.poll()
            if code and code not in (129, 130, 143):  # those are ends that were asked for, of all ranks
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return Failure(self.rank, max(code, 1), f"rank {self.rank + local_rank} {how}")
        for rank, pid in self._pids.items() if not children else ():
            if not runtime.process_lives(pid):
                return Failure(self.rank, 1, f"rank {rank} (process {pid}) has died")
        return None

    def announce(self, failure: Failure) -> Failure:
        """Tell all ranks of a failure, and return the failure that was first; the rank that it is `by` reports it."""
        self._mine = failure
        self._wake.set()
        if self._store is not None and self._answered.wait(2.0) and self.rank == 0:
            self._keep_store(2.0)
        return self._heard or failure

    def _keep_store(self, seconds: float) -> None:
        """Wait until the other ranks have heard: else they find the store gone with this rank, and each reports that."""
        end = time.monotonic() + seconds
        while self._store.add(HEARD, 0) < self._ranks and time.monotonic() < end:
            time.sleep(0.05)

    def take_over(self) -> None:
        """Take the children from Lightning's observer, which would kill this rank before it reports an error."""
        if self.children:
            for thread in threading.enumerate():
                if isinstance(thread, _ChildProcessObserver):
                    thread._child_processes = []

    def kill(self) -> None:
        """End the other ranks of this node at once, also those that are stopped and could not end themselves."""
        for child in self.children:
            child.kill()
        for pid in self._pids.values() if not self.children else ():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def await_children(self, seconds: float) -> Failure | None:
        """Wait for the ranks that this one launched to end, kill what does not, and return how one of them failed.

        Ranks of another launcher end when they are done, which is no death.
        """
        for child in self.children:
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
                return Failure(self.rank, 1, f"a rank (process {child.pid}) did not end within {seconds:.0f} s")
        return self._died() if self.children else None

    def close(self) -> None:
        """Stop listening, and wait until the thread that listens has ended.

        Python ends a thread that comes back from a call of the store after the interpreter's end by unwinding its stack, and
        C++ answers that with `std::terminate`: a rank whose thread lives on can end with SIGABRT after a finished run.
        """
        self._closed.set()
        self._wake.set()
        if self._listener.is_alive():
            self._listener.join(JOIN_SECONDS)


def leave_process_group() -> None:
    """Destroy the process group, if there is one; no collective may be under way in it.

    A finished run does it at exit, while Python still runs. The group's threads free the tensors of the last collectives, and
    for a tensor that Python knows they take the interpreter's lock. A thread that waits for the lock when the interpreter ends
    is unwound, which C++ answers with `std::terminate`: a finished rank would end with SIGABRT.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
