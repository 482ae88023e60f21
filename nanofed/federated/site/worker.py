"""A site's worker: it takes messages from the SuperNode, trains and answers, and keeps model, optimizer state and data at hand.

    python -m nanofed.federated.site.worker OPTIONS ARGUMENTS OF FEDERATE

OPTIONS are a WorkerOptions as JSON. Under `torchrun --nproc_per_node N` for N devices every rank is such a process: the first
one takes the messages, the others follow it.
"""

from __future__ import annotations

# ruff: noqa: E402
from nanofed.training.lightning_import import import_lightning

import_lightning()  # before the modules that import it themselves: this one is imported by a process of its own

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from lightning import Fabric

from nanofed import runtime, streams
from nanofed.errors import NanofedError
from nanofed.federated.config import Arguments
from nanofed.federated.outcome import Outcome
from nanofed.federated.site.client import client_app
from nanofed.federated.site.inbox import Inbox, Task
from nanofed.federated.site.options import WorkerOptions
from nanofed.federated.site.progress import Progress
from nanofed.federated.site.ranks import PATIENCE, Agreed, Turn
from nanofed.federated.site.trainer import FabricTrainer
from nanofed.federated.wire.bundle import check_bundle
from nanofed.federated.wire.codec import Arrays, WireError
from nanofed.federated.wire.messages import Evaluate, Evaluation, Hello, Instructions, Report
from nanofed.federated.wire.weights_client import WeightsClient
from nanofed.training.gc_control import FrozenObjects
from nanofed.training.lightning_errors import lightning_errors
from nanofed.training.loop import Stopwatch
from nanofed.training.recipe import accumulation_steps
from nanofed.training.strategy import FabricShardedStrategy, cluster_environment

logger = logging.getLogger("nanofed.federated.site.worker")  # the module itself is __main__

LAUNCHER_POLL = 1.0  # seconds between two looks for the processes without which this one is an orphan
AHEAD = "ahead"  # what the first rank tells the others where they train on together
T = TypeVar("T")
# Something to do and where its result goes, or why to end.
Job = tuple[Callable[[], Any], "Future[Any]"] | BaseException
LOG_FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"


class RoundAborted(NanofedError):
    """The round is not wanted any more; the message says why."""


class _Turn(Turn):
    """A round that a task asks for; `deadline` seconds after its start its answer is worth nothing."""

    def __init__(self, task: Task, progress: Progress, deadline: float | None = None) -> None:
        super().__init__(progress)
        self.arrived: float = time.monotonic()
        self._task = task
        self._deadline = deadline

    def check(self) -> None:
        super().check()
        if self._task.cancelled is not None:
            raise RoundAborted(f"the round was aborted: {self._task.cancelled}")
        if self._deadline is not None and time.monotonic() - self.arrived > self._deadline:
            raise RoundAborted(
                f"the round was aborted: it is over at the server, {self._deadline:g} s after it arrived"
            )


class _UntilAsked(Stopwatch):
    """Shows 0 until there is something else to do."""

    def __init__(self, jobs: queue.Queue[Job]) -> None:
        self._jobs = jobs

    def elapsed(self) -> float:
        return 0.0 if self._jobs.empty() else 1.0


class SiteTrainer:
    """The trainer of a site's client on the first rank: what it is asked to do, all ranks do together.

    One thread takes messages, fetches weights and delivers answers, and asks for what they say; the main thread does that
    (`work`), and trains on in between where a round says so.

    Args:
        trainer: It trains and evaluates on this rank.
        progress: It hears how far the trainer is.

    Attributes:
        task: The message that is worked on.
        broken: An error that leaves ranks or a device in an unknown state: the process has to be started anew.
        idle: Set while no message is worked on: all answers have been handed over.
    """

    task: Task

    def __init__(self, trainer: FabricTrainer, progress: Progress) -> None:
        self.broken: Exception | None = None
        self._trainer = trainer
        self._progress = progress
        self.idle = threading.Event()
        self.idle.set()
        self._unsaved: Instructions | None = None
        self._jobs: queue.Queue[Job] = queue.Queue()

    # --- in the thread of the messages

    def hello(self, client: str) -> Hello:
        """Say who the client is and what it runs."""
        return self._trainer.hello(client)

    def fit(self, arrays: Arrays, instructions: Instructions) -> tuple[Arrays, Report]:
        """Have one round trained on all ranks."""
        return self._ask(lambda: self._fit(arrays, instructions))

    def evaluate(self, arrays: Arrays, asked: Evaluate) -> Evaluation:
        """Have weights evaluated on all ranks."""
        return self._ask(lambda: self._evaluate(arrays, asked))

    def _ask(self, do: Callable[[], T]) -> T:
        answer: Future[T] = Future()
        self._jobs.put((do, answer))
        return answer.result()

    def end(self, error: BaseException) -> None:
        """Have the main thread end with an error."""
        self._jobs.put(error)

    # --- in the main thread

    @FrozenObjects()
    def work(self) -> None:
        """Do what is asked for, one thing after another.

        Raises:
            BaseException: One that `end` was called with.
        """
        while True:
            job = self._next()
            if isinstance(job, BaseException):
                raise job
            do, answer = job
            try:
                if self.broken is not None:
                    raise self.broken
                answer.set_result(do())
            except Exception as error:
                answer.set_exception(error)
            del do, answer, job  # they hold the weights

    def _next(self) -> Job:
        """Return the next thing to do; until it is there, save what is unsaved, and train on."""
        self._progress.say(state="idle")
        if self._jobs.empty() and self.broken is None:
            self._save()
            if self._trainer.ahead_steps():
                self._train_ahead()
                self._progress.say(state="idle")
        return self._jobs.get()

    def _fit(self, arrays: Arrays, instructions: Instructions) -> tuple[Arrays, Report]:
        self._save()  # of the round before, where this one has come at once
        with self._on_all_ranks(instructions):
            self._progress.begin(instructions)
            turn = _Turn(self.task, self._progress, instructions.deadline_seconds)
            payload, report = self._trainer.train(arrays, instructions, turn)
        self._unsaved = instructions
        self._progress.trained(report.steps, report.tokens_per_second)
        losses, speed = (report.loss_first, report.loss_last), report.tokens_per_second
        early = f" ({report.ahead} before its weights were here)" if report.ahead else ""
        logger.info(
            "round %d: %d steps%s, loss %.4f to %.4f, %.0f tokens/s", report.round, report.steps, early, *losses, speed
        )
        return payload, report

    def _evaluate(self, arrays: Arrays, asked: Evaluate) -> Evaluation:
        self._save()
        with self._on_all_ranks(asked):
            self._progress.say(state="evaluating", run=asked.run, round=asked.round, steps=0)
            return self._trainer.evaluate(arrays, asked, _Turn(self.task, self._progress))

    def _train_ahead(self) -> None:
        self._progress.say(state="training")
        try:
            with self._on_all_ranks(AHEAD):
                self._trainer.train_ahead(_UntilAsked(self._jobs), Turn(self._progress))
        except Exception as error:
            if self.broken is not None and self.idle.is_set():
                raise  # else the round before is still on its way to the server, and its thread ends this process then
            logger.warning("the site could not train on after its round: %s", error)

    def _save(self) -> None:
        """Save the optimizer state of the round that was trained last, on all ranks, where that is not done yet."""
        instructions, self._unsaved = self._unsaved, None
        if instructions is not None:
            self._trainer.ranks.from_first(None)
            self._trainer.save(instructions)
            self._progress.say(unwritten=self._trainer.states.unwritten)

    @contextmanager
    def _on_all_ranks(self, asked: Instructions | Evaluate | str) -> Iterator[None]:
        try:
            self._trainer.ranks.from_first(asked)
            yield
        except Agreed:
            raise
        except Exception as error:
            for_people = isinstance(error, (NanofedError, WireError))
            logger.warning("the round failed: %s", error, exc_info=not for_people)
            if self._trainer.ranks.size > 1 or not (for_people or self._trainer.is_sound(error)):
                self.broken = error
            raise


@FrozenObjects()
def follow(trainer: FabricTrainer) -> None:
    """Do on another rank what the first one does, round after round."""
    nothing: Instructions | Evaluate | str | None = None
    trained: Instructions | None = None
    while True:
        asked = trainer.ranks.from_first(nothing)
        try:
            if isinstance(asked, Evaluate):
                trainer.evaluate([], asked)
            elif asked == AHEAD:
                trainer.train_ahead(Stopwatch(), Turn())
            elif isinstance(asked, Instructions):
                trainer.train([], trained := asked)
            elif trained is not None:
                trainer.save(trained)
        except Agreed as error:  # the first rank tells
            logger.debug("%s", error)


def lead(options: WorkerOptions, inbox: Inbox, trainer: SiteTrainer) -> None:
    """Take messages and answer them, one after another, until the trainer is broken: it is told to end then."""
    try:
        app = client_app(lambda context: trainer, WeightsClient(options.superlink, options.authority, options.key))
        while trainer.broken is None:
            trainer.task = task = inbox.next()
            trainer.idle.clear()
            try:
                message, context, bundle = task.receive()
            except Exception as error:
                logger.warning("a message could not be taken: %s", error)
                task.give_up()
                trainer.idle.set()
                continue
            try:
                check_bundle(bundle)
                reply = app(message, context)
            except Exception as error:
                reason = (
                    str(error) if isinstance(error, (NanofedError, WireError)) else f"{type(error).__name__}: {error}"
                )
                logger.warning("%s is refused: %s", message.metadata.message_type, reason)
                reply = Message(
                    Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"site {options.name}: {reason}"), reply_to=message
                )
            try:
                task.answer(reply, context)
            except Exception as error:  # the SuperNode is gone, or has answered for this process
                logger.warning("an answer cannot be handed over: %s", error)
            del message, reply
            trainer.idle.set()
        trainer.end(trainer.broken)
    except BaseException as error:
        trainer.end(error)


def main(args: Sequence[str]) -> int:
    """Work until the process is ended; return an exit code if it cannot."""
    streams.secure(lasting=True)
    logging.basicConfig(format=LOG_FORMAT, level=logging.WARNING)
    logging.getLogger("nanofed").setLevel(logging.INFO)
    options = None
    try:
        options = WorkerOptions.from_json(args[0] if args else "")
        threading.Thread(target=_end_with, args=(options.supervisor,), name="nanofed-orphan", daemon=True).start()
        first = runtime.is_first_rank()
        progress = Progress(options.progress if first else None)
        trainer = build(args[1:], options)
        if not first:
            follow(trainer)
        progress.say(state="idle", ranks=trainer.ranks.size)
        logger.info("the worker of %s is ready: %d devices", options.name, trainer.ranks.size)
        site = SiteTrainer(trainer, progress)
        inbox = Inbox(options.supernode, options.secret.read_bytes())
        threading.Thread(target=lead, args=(options, inbox, site), name="nanofed-messages", daemon=True).start()
        site.work()
    except Exception as error:
        time.sleep(runtime.seconds_to_hold_back())
        outcome = Outcome.of(error)
        logger.error("%s", outcome.reason, exc_info=not isinstance(error, NanofedError))
        if options is not None:
            with suppress(OSError):  # the disk is full; the log has it
                outcome.write(options.folder)
        return outcome.exit_code
    return 0


def build(args: Sequence[str], site: WorkerOptions) -> FabricTrainer:
    """Return this rank's trainer.

    Args:
        args: command-line arguments of `nanofed federate`.
        site: The site's options: optimizer states are kept in its folder, and its devices train, whatever the arguments say.

    Raises:
        ConfigError: the arguments or devices are wrong, or a batch does not divide into these devices'.
        DataError: shards or tokenizer are.
    """
    arguments = Arguments.from_args(args)
    module, data = arguments.build()
    accelerator = arguments.fabric_options.accelerator
    devices, machines = runtime.launched_ranks() or (site.devices, 1)
    runtime.warn_of_unused_gpu(accelerator)
    with lightning_errors("fabric", building=True):  # devices that are not there
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=machines,
            strategy=FabricShardedStrategy(timeout=PATIENCE) if devices * machines > 1 else "auto",
            plugins=[cluster_environment()],
        )
    fabric.launch()
    if arguments.federation.global_batch_tokens is None:  # else it depends on who else is there
        accumulation_steps(
            module.recipe.batch_tokens,
            device_batch_size=data.device_batch_size,
            sequence_len=data.sequence_len,
            world_size=fabric.world_size,
        )
    return FabricTrainer(module, data, fabric, site.folder / "state", durable=True)


def _end_with(supervisor: int) -> None:
    """End this rank when torchrun's agent, the first rank, or the process that watches the worker is gone."""
    while not runtime.launcher_is_gone() and (not supervisor or runtime.process_lives(supervisor)):
        time.sleep(LAUNCHER_POLL)
    logger.error("the process that started this worker is gone: it ends")
    os._exit(1)  # the main thread may stand in a collective


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
