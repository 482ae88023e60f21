"""The trainer of a site in a process of its own, as its supervisor starts it, and rounds to ask of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import uvicorn
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from nanofed.data.rows import RowRange
from nanofed.data.shards import open_dataset
from nanofed.federated.config import Arguments
from nanofed.federated.flower import free_port
from nanofed.federated.site.options import WorkerOptions
from nanofed.federated.site.progress import Page
from nanofed.federated.wire.bundle import installed
from nanofed.federated.wire.codec import hash_arrays
from nanofed.federated.wire.messages import Evaluate, Evaluation, Failure, Instructions, Report
from tests.federated.tiny import arguments
from tests.ranks import TORCHRUN
from tests.support import BATCH, REPOSITORY

RUN, NODE = 1, 7
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
            "lease": tuple(RowRange(shard.name, 0, shard.num_rows, epoch) for epoch in range(40) for shard in shards),
            "data": self.data,
        }
        values |= {"down_codec": "fp32", "changed_from": "", "up_codec": "fp32"}
        values |= {"max_steps": 2, "seconds": None, "deadline_seconds": None}
        values |= {"participants": 1, "batch_tokens": BATCH, "horizon_tokens": 1000 * BATCH}
        values |= {"clock_step": self.steps, "clock_tokens": self.tokens, "overlap": False}
        return Instructions(**{**values, **changes})

    def evaluate(self, **changes: Any) -> Evaluate:
        """Ask for the next round's weights to be measured on the second half of 15 rows."""
        told = self.instructions()
        values: dict[str, Any] = {"eval_tokens": 480, "share": 1, "shares": 2, "seconds": 60.0}
        return Evaluate(**{**told.described(), **values, **changes})

    def merge(self, answer: tuple[Arrays, Report]) -> None:
        arrays, report = answer
        self.weights = [array.copy() for array in arrays]
        self.number, self.data = report.round, report.data
        self.tokens, self.steps = self.tokens + report.tokens, self.steps + report.steps
        self.reports.append(report)

    def copy(self) -> Rounds:
        return replace(self, weights=list(self.weights), reports=list(self.reports))


class RefusedByWorker(Exception):
    """The worker answered with an error."""


class SuperNode:
    """The runtime API of Flower's SuperNode, its own code in this process, and messages for the worker that calls it."""

    def __init__(self, secret: bytes) -> None:
        self.port = free_port()
        self._secret = secret
        bundle = io.BytesIO()
        with zipfile.ZipFile(bundle, "w") as archive:
            for name, content in installed().items():
                archive.writestr(name, content)
        self.bundle = bundle.getvalue()
        self._start()

    def _start(self) -> None:
        store = ObjectStoreFactory()
        factory = NodeStateFactory(store)
        self._state = factory.state()
        self._state.set_node_id(NODE)
        self._objects = store.store()
        self._replies: dict[str, Message] = {}
        app = create_app(factory, self._secret)
        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def restart(self) -> None:
        """Begin anew, knowing nothing of before, as after a kill."""
        self.close()
        self._start()

    def send(
        self, kind: str, content: RecordDict, ttl: float = 3600.0, sent: float | None = None, *, whole: bool = True
    ) -> str:
        """Lay a message down as Flower's own loop does when it has received one, and return its id.

        One that is not whole is what is left of a message whose run has ended while it was received.
        """
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 1
        run = Run.create_empty(run_id=RUN)
        run.fab_hash = hashlib.sha256(self.bundle).hexdigest()
        self._state.store_run(run)
        self._state.store_fab(Fab(run.fab_hash, self.bundle, {}))
        context = Context(run_id=RUN, node_id=NODE, node_config={"name": NAME}, state=RecordDict(), run_config={})
        self._state.set_run_series_context(run.series_id, context)
        message = Message(content, NODE, kind, ttl=ttl, group_id="1")
        if sent is not None:
            message.metadata.__dict__["_created_at"] = sent
        self._state.create_task(task_type=TaskType.CLIENT_APP, run_id=RUN, fab_hash=run.fab_hash)
        if whole:
            start_client_internal._insert_message(message, self._state, self._objects)
        else:
            message.metadata.__dict__["_message_id"] = message.object_id
            self._state.store_message(message)
            self._objects.preregister(RUN, get_object_tree(message))
        return message.metadata.message_id

    def reply(self, message_id: str, seconds: float) -> Message:
        """Wait for the answer to a message.

        Raises:
            TimeoutError: none came.
        """
        end = time.monotonic() + seconds
        while message_id not in self._replies:
            if time.monotonic() > end:
                raise TimeoutError(f"no answer within {seconds} s")
            for found in self._state.get_messages_legacy(is_reply=True):
                tree = self._objects.get_object_tree(found.metadata.message_id)
                whole = pull_and_inflate_object_from_tree(tree, self._piece, lambda name: None, return_type=Message)
                self._replies[found.metadata.reply_to_message_id] = whole
            time.sleep(0.01)
        return self._replies.pop(message_id)

    def _piece(self, name: str) -> bytes:
        """Wait for a piece of an answer: the answer is there before what is in it."""
        while not (content := self._objects.get(name)):
            time.sleep(0.005)
        return content


class Trainer:
    """A running worker of a site, and the SuperNode that it takes messages from; `module` may run in its place."""

    def __init__(
        self, args: Sequence[str], state: Path, *, ranks: int = 1, module: str = "nanofed.federated.site.worker"
    ) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self.log = state / "worker.log"
        secret = "a secret"
        (state / "secret").write_text(secret)
        self.supernode = SuperNode(secret.encode())
        self.page = Page(state)
        launcher = [*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        at, progress = f"127.0.0.1:{self.supernode.port}", self.page.path
        site = ("127.0.0.1:1", NAME, None, None, state)
        self.options = WorkerOptions(*site, supernode=at, progress=progress, supervisor=os.getpid())
        self._command = [sys.executable, *launcher, "-m", module]
        self._args = args
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self.started = time.monotonic()
        with self.log.open("ab") as log:
            command = [*self._command, self.options.to_json(), *self._args]
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.supernode.close()
        self.page.close()

    def kill(self) -> None:
        """End all of its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def figures(self, seconds: float = 60.0) -> Mapping[str, Any]:
        """Return what the worker says of itself from now on."""
        asked = time.monotonic()
        while (found := self.page.read(since=max(self.started, asked))) is None:
            assert time.monotonic() - asked < seconds, f"the worker says nothing\n{self.output[-4000:]}"
            time.sleep(0.02)
        return found

    def wait_until(
        self, condition: Callable[[Mapping[str, Any]], bool], what: str, seconds: float = 120
    ) -> Mapping[str, Any]:
        end = time.monotonic() + seconds
        while not condition(figures := self.figures()):
            assert time.monotonic() < end, f"no {what} after {seconds} s: {figures}\n{self.output[-4000:]}"
        return figures

    def wait_for_training(self, steps: int = 1) -> Mapping[str, Any]:
        return self.wait_until(lambda now: now["state"] == "training" and now["steps"] >= steps, "training")

    def call(
        self,
        kind: str,
        config: dict[str, Any],
        weights: Sequence[npt.NDArray[Any]] = (),
        wait: float = 120.0,
        sent: float | None = None,
    ) -> tuple[Arrays, dict[str, Any]]:
        """Send a message as the server does and return the arrays and metrics of the answer.

        Raises:
            RefusedByWorker: the worker says why.
        """
        record = {"train": "fit", "evaluate": "evaluate", "get_properties": "getproperties"}[kind]
        content = RecordDict({f"{record}ins.config": ConfigRecord(config)})
        if weights:  # else the worker has to do without the record, as with a server that leaves it out
            content[f"{record}ins.parameters"] = ArrayRecord(list(weights))
        reply = self.supernode.reply(self.supernode.send(kind, content, sent=sent), wait)
        if reply.has_error():
            raise RefusedByWorker(reply.error.reason)
        configs, arrays = reply.content.config_records, reply.content.array_records
        metrics = dict(configs.get(f"{record}res.metrics") or configs.get(f"{record}res.properties") or {})
        found = (arrays.get("fitres.parameters") or {}).values()
        assert len(reply.content) == 1 + bool(found), f"records that nobody reads: {[*reply.content]}"
        return [a.numpy() for a in found], metrics

    def ask(self, instructions: Instructions, weights: Arrays, wait: float = 120.0) -> tuple[Arrays, Report]:
        """Have a round trained.

        Raises:
            RefusedByWorker: the worker says why.
        """
        arrays, metrics = self.call("train", instructions.to_config(), weights, wait)
        if Failure.key in metrics:
            failure = Failure.from_config(metrics)
            raise RefusedByWorker(f"site {failure.client}: {failure.kind}: {failure.reason}")
        report = Report.from_config(metrics)
        assert hash_arrays(arrays) == report.payload_hash
        return arrays, report

    def evaluate(self, asked: Evaluate, weights: Arrays) -> Evaluation:
        return Evaluation.from_config(self.call("evaluate", asked.to_config(), weights)[1])

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
        self.error: Exception | None = None
        asked = (trainer, rounds.instructions(**changes), list(rounds.weights))
        self._thread = threading.Thread(target=self._run, args=asked, daemon=True)
        self._thread.start()

    def _run(self, trainer: Trainer, instructions: Instructions, weights: Arrays) -> None:
        try:
            self.answer = trainer.ask(instructions, weights)
        except (RefusedByWorker, TimeoutError) as error:
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
