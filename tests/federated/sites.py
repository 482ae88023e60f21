"""The trainer of a site in a process of its own, as its supervisor starts it, and rounds to ask of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanofed.data.rows import RowRange
from nanofed.data.shards import open_dataset
from nanofed.federated.arguments import Arguments
from nanofed.federated.site.channel import ChannelError, call
from nanofed.federated.wire.codec import hash_arrays
from nanofed.federated.wire.evaluation import Evaluate
from nanofed.federated.wire.messages import Instructions, Report
from tests.federated.tiny import BATCH, arguments
from tests.ranks import REPOSITORY, TORCHRUN

NAME = "lab-a"
Arrays = list[npt.NDArray[np.generic]]


def initial_weights(args: Sequence[str]) -> Arrays:
    """Return the weights that every process of these arguments starts from."""
    module, _ = Arguments.from_args(args).build()
    module.configure_model()
    return [tensor.detach().numpy().copy() for tensor in module.gpt.state_dict().values()]


@dataclass
class Rounds:
    """Writes instructions as a server with one site would, and keeps what it has merged: all of each answer."""

    corpus: Path
    weights: Arrays
    run: str = "a" * 32
    number: int = 0
    tokens: int = 0
    steps: int = 0
    data: Any = None
    reports: list[Report] = field(default_factory=list)

    def instructions(self, **changes: Any) -> Instructions:
        shards = open_dataset(self.corpus / "data").train
        values: dict[str, Any] = {
            "run": self.run,
            "round": self.number + 1,
            "client": NAME,
            "nonce": f"{self.number:032x}",
            "base_hash": hash_arrays(self.weights),
            "down_codec": "fp32",
            "up_codec": "fp32",
            "max_steps": 2,
            "seconds": None,
            "deadline_seconds": None,
            "participants": 1,
            "batch_tokens": BATCH,
            "clock_step": self.steps,
            "clock_tokens": self.tokens,
            "horizon_tokens": 1000 * BATCH,
            "lease": tuple(RowRange(shard.name, 0, shard.num_rows, epoch) for epoch in range(40) for shard in shards),
            "data": self.data,
        }
        return Instructions(**{**values, **changes})

    def evaluate(self, **changes: Any) -> Evaluate:
        """Ask for the next round's weights to be measured on the second half of 15 rows."""
        told = self.instructions()
        names = ("run", "round", "client", "nonce", "base_hash", "down_codec")
        values: dict[str, Any] = {"eval_tokens": 480, "share": 1, "shares": 2, "seconds": 60.0}
        return Evaluate(**{**{name: getattr(told, name) for name in names}, **values, **changes})

    def merge(self, answer: tuple[Arrays, Report]) -> None:
        arrays, report = answer
        self.weights = [array.copy() for array in arrays]
        self.number, self.data = report.round, report.data
        self.tokens, self.steps = self.tokens + report.tokens, self.steps + report.steps
        self.reports.append(report)

    def copy(self) -> Rounds:
        return replace(self, weights=list(self.weights), reports=list(self.reports))


class Trainer:
    """A running trainer.

    Args:
        args: of `nanofed federate`.
        state: its state folder.
        ranks: under torchrun, if there are several.
        wrapper: a module of the tests to run in place of the service.
    """

    def __init__(
        self, args: Sequence[str], state: Path, *, ranks: int = 1, module: str = "nanofed.federated.site.service"
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nanofed-")  # the path of a socket must be short
        self.socket = Path(self._folder.name) / "trainer.sock"
        self.log = Path(self._folder.name) / "log"
        launcher = [*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        own = [f"--name={NAME}", f"--socket={self.socket}", f"--state={state}", f"--supervisor={os.getpid()}"]
        self._command = [sys.executable, *launcher, "-m", module, *own, *args]
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        """End all of its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ping(self, wait: float = 60.0) -> dict[str, Any]:
        return call(self.socket, "ping", {}, wait=wait)[2]

    def wait_until(
        self, condition: Callable[[dict[str, Any]], bool], what: str, seconds: float = 120
    ) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while not condition(figures := self.ping()):
            assert time.monotonic() < end, f"no {what} after {seconds} s: {figures}\n{self.output[-4000:]}"
            time.sleep(0.02)
        return figures

    def wait_for_training(self, steps: int = 1) -> dict[str, Any]:
        return self.wait_until(lambda now: now["state"] == "training" and now["steps"] >= steps, "training")

    def ask(self, instructions: Instructions, weights: Arrays, wait: float = 120.0) -> tuple[Arrays, Report]:
        """Have a round trained; what the trainer says against it is a ChannelError."""
        config = {"client": NAME, "message": instructions.to_config()}
        arrays, examples, metrics = call(self.socket, "fit", config, weights, wait)
        report = Report.from_config(metrics)
        assert examples == report.tokens and hash_arrays(arrays) == report.payload_hash
        return arrays, report

    def train(self, rounds: Rounds, **changes: Any) -> Report:
        """Have the next round trained and merged."""
        answer = self.ask(rounds.instructions(**changes), rounds.weights)
        rounds.merge(answer)
        return answer[1]

    def in_background(self, rounds: Rounds, **changes: Any) -> Asked:
        return Asked(self, rounds, changes)


class Asked:
    """A round asked for in a thread."""

    def __init__(self, trainer: Trainer, rounds: Rounds, changes: dict[str, Any]) -> None:
        self.answer: tuple[Arrays, Report] | None = None
        self.error: ChannelError | None = None
        asked = (trainer, rounds.instructions(**changes), list(rounds.weights))
        self._thread = threading.Thread(target=self._run, args=asked, daemon=True)
        self._thread.start()

    def _run(self, trainer: Trainer, instructions: Instructions, weights: Arrays) -> None:
        try:
            self.answer = trainer.ask(instructions, weights)
        except ChannelError as error:
            self.error = error

    def wait(self, seconds: float = 60) -> Asked:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"no answer after {seconds} s"
        return self


def tiny_args(corpus: Path, folder: Path, **changes: Any) -> list[str]:
    """Arguments of a federation of the tiny model at a site."""
    return arguments(corpus, folder, "run", **changes)


def same(a: Sequence[npt.NDArray[Any]], b: Sequence[npt.NDArray[Any]]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
