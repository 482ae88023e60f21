"""Every rank of a run of several is watched: when one dies or hangs, all end, and no process is left behind."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from nanofed import runtime
from nanofed.errors import NanofedError
from nanofed.ranges import SecondsOrZero, check_numbers
from nanofed.training.callbacks.peers import POLL, Failure, Peers, leave_process_group

logger = logging.getLogger(__name__)

GRACE = 4.0  # seconds between the news of a failure and the end, for ranks that end by themselves and say why
# How torch's backends tell that the other end of a connection is not there any more.
LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|remote process exited|communicator was aborted|socket closed|broken pipe",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Limits:
    """The longest that a rank of several may go without progress, in seconds; 0 sets no limit.

    Progress is a micro-batch done. The limit of a start, an evaluation or a save stands until the first training step
    after it, because ranks that have less to do then wait there for the others.

    Attributes:
        step: the limit in the steady state; ten usual micro-batches where those take longer (a large model on CPUs).
        startup: the limit until the first optimizer step is done: data, process group, first compile.
        evaluation: the limit of one micro-batch of a validation, and of what follows a validation, such as text samples.
        save: the limit of one checkpoint.
    """

    step: SecondsOrZero = 120.0
    startup: SecondsOrZero = 3600.0
    evaluation: SecondsOrZero = 1800.0
    save: SecondsOrZero = 1800.0

    def __post_init__(self) -> None:
        """Refuse what is no time."""
        check_numbers(self, "watchdog.")


class Watchdog(Callback):
    """Watches this rank and its peers from a thread, and ends the process where the main thread cannot.

    A main thread that waits in a collective for a rank that is gone cannot be interrupted, hence `os._exit`. On CUDA the
    host runs ahead of the device, and what is watched is the host: when the device hangs, the host stands still at its next
    read of a loss or as soon as the queue of launches is full, a few steps later, and the limit counts from there.

    One process alone is not watched: nobody waits for it, and it may stand in a debugger or a notebook.

    Args:
        limits: the limits on time without progress.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._peers: Peers | None = None
        self._phase = "startup"
        self._step = 0
        self._first_step = 0  # where this start began
        self._idle = 0.0  # seconds without progress, as the watching thread has counted them
        self._usual = 0.0  # seconds of a micro-batch
        self._beaten = 0.0
        self._main = threading.main_thread()
        self._done = threading.Event()

    def patience(self, strategy: Any) -> None:
        """Give collectives more time than any limit here: then no slow save or compile is ended by the process group."""
        if isinstance(strategy, DDPStrategy):
            limits = vars(self._limits).values()
            strategy._timeout = timedelta(days=7) if 0 in limits else timedelta(seconds=2 * max(limits))

    @contextlib.contextmanager
    def over(self, trainer: Trainer) -> Iterator[None]:
        """Watch the block on every rank: an error of one rank ends all of them, and only one rank reports it."""
        if trainer.world_size == 1:
            yield
            return
        peers = self._peers = Peers(trainer)
        watching = threading.Thread(target=self._watch, args=(peers,), name="nanofed-watchdog", daemon=True)
        watching.start()
        try:
            yield
            self._expect("save")
            trainer.strategy.barrier("end")
            atexit.register(leave_process_group)
        except Exception as error:
            self._fail(peers, error)
        finally:  # also of an end that was asked for, by SIGINT or SIGTERM: all ranks got it
            self._done.set()
            watching.join()  # no thread of the run may outlive it: see Peers.close
            peers.close()
        failure = peers.await_children(60.0)
        if failure is not None:
            raise NanofedError(failure.message)

    def _fail(self, peers: Peers, error: Exception) -> None:
        """End this rank: by its own error, or without a word where another rank has failed first."""
        lost = isinstance(error, RuntimeError) and LOST.search(str(error)) is not None
        if lost:  # by a rank that has failed and told, or that has died, which shows in a moment
            for _ in range(4):
                if peers.failure() is None:
                    time.sleep(POLL)
        code = getattr(error, "exit_code", 1)
        own = Failure(peers.rank, code, f"rank {peers.rank} at step {self._step}: {_line(error)}")
        said = peers.announce((peers.failure() if lost else None) or own)
        self._done.set()
        if said.by != peers.rank:
            time.sleep(GRACE / 2)  # let it speak: a launcher ends all others as soon as it sees the first end
            raise SystemExit(said.code) from error
        if lost:
            raise NanofedError(f"{said.message}: all ranks end") from error
        raise error

    # The watching thread

    def _watch(self, peers: Peers) -> None:
        ended_at: float | None = None
        last = time.monotonic()
        while not self._done.wait(POLL):
            now = time.monotonic()
            # Seconds in which this thread did not run either (Ctrl-Z, a closed lid, an overloaded machine) do not count.
            self._idle += min(now - last, 4 * POLL)
            last = now
            peers.take_over()
            if runtime.launcher_is_gone():
                self._end(
                    peers, Failure(peers.rank, 1, f"rank {peers.rank} ends: the process that launched it has gone")
                )
            failure = peers.failure()
            if failure is not None:
                ended_at = ended_at or now
                if now - ended_at > GRACE:
                    self._end(peers, failure)
            limit = self._limit()
            if limit and self._idle > limit:
                self._end(peers, self._hang(peers.rank, limit), hangs=True)

    def _limit(self) -> float:
        limit: float = getattr(self._limits, self._phase)
        return max(limit, 10 * self._usual) if limit and self._phase == "step" else limit

    def _hang(self, rank: int, limit: float) -> Failure:
        where = _where(self._main)
        return Failure(
            rank,
            1,
            f"rank {rank} has made no progress for {self._idle:.0f} s (watchdog.{self._phase} allows {limit:.0f} s) after "
            f"step {self._step}: it stands in {where}",
        )

    def _end(self, peers: Peers, failure: Failure, *, hangs: bool = False) -> None:
        said = peers.announce(failure)
        if hangs or said.by == peers.rank:
            logger.error("%s", failure.message)
        for handler in logging.getLogger("nanofed").handlers:
            handler.flush()
        if hangs:  # the time of the other ranks is up too: they say where they stand, and the first one ends by itself
            time.sleep(GRACE if peers.rank else GRACE / 2)
        peers.kill()
        os._exit(said.code)

    # What the main thread does

    def _expect(self, phase: str) -> None:
        self._phase = phase
        self._idle = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Meet the other ranks: the process group has just been made."""
        if self._peers is not None:
            self._peers.join(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the first step the time of a start."""
        self._expect("startup")
        self._step = self._first_step = trainer.global_step
        self._beaten = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Count progress; a start is over with the first full optimizer step, which compiles its own graphs."""
        now = time.monotonic()
        if self._phase in ("startup", "step"):  # not the time of a validation or a save
            self._usual = (self._usual + now - self._beaten) / 2
        self._beaten = now
        self._step = trainer.global_step
        self._expect("step" if self._step > self._first_step else "startup")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give an evaluation its own time, its compile included."""
        self._expect("evaluation")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Count progress."""
        self.progress()

    def progress(self) -> None:
        """Count progress of an evaluation that is no part of Lightning's own."""
        self._idle = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Give a save its own time: the first hook of one, before the optimizer's state is gathered; nothing is kept."""
        self._expect("save")
        return {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the last save its own time."""
        self._expect("save")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _where(thread: threading.Thread) -> str:
    """Return where a thread stands: its innermost line, and the innermost one of ours."""
    frames: Mapping[int, Any] = sys._current_frames()
    frame = frames.get(thread.ident or 0)
    if frame is None:
        return "no Python code"
    stack = traceback.extract_stack(frame)
    ours = [entry for entry in stack if "nanofed" in entry.filename.replace("\\", "/").split("/")]
    entries = [stack[-1], *(ours[-1:] if ours and ours[-1] is not stack[-1] else [])]
    return ", called from ".join(
        f"{entry.name} ({'/'.join(entry.filename.split('/')[-2:])}:{entry.lineno})" for entry in entries
    )
