"""The rounds of a site's trainer: the first rank takes them from the socket, the others follow it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric

from nanofed import runtime
from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.arguments import Arguments
from nanofed.federated.site.channel import ChannelError, MemoryRoom
from nanofed.federated.site.listener import Listener, Request
from nanofed.federated.site.progress import Progress
from nanofed.federated.site.ranks import PATIENCE, Agreed, Turn
from nanofed.federated.site.trainer import Arrays, FabricTrainer
from nanofed.federated.wire.codec import WireError
from nanofed.federated.wire.evaluation import Evaluate, Evaluation
from nanofed.federated.wire.messages import UNWRITTEN, Instructions, Report
from nanofed.federated.wire.names import SAFE_NAME
from nanofed.training.gc_control import FrozenObjects
from nanofed.training.lightning_errors import lightning_errors
from nanofed.training.recipe import accumulation_steps
from nanofed.training.strategy import FabricShardedStrategy, cluster_environment

logger = logging.getLogger(__name__)


class Refused(NanofedError):
    """A request that no rank has heard of yet."""


class RoundAborted(NanofedError):
    """The round is not wanted any more; the message says why."""


class _Turn(Turn):
    """A round that came over the socket.

    It has a hard end: `deadline` seconds after it arrived its answer is worth nothing.
    """

    def __init__(self, request: Request, progress: Progress, deadline: float | None) -> None:
        self.arrived: float = request.arrived
        self._request = request
        self._progress = progress
        self._deadline = deadline

    def check(self) -> None:
        self._progress.alive()
        if self._request.cancelled is not None:
            raise RoundAborted(f"the round was aborted: {self._request.cancelled}")
        if self._deadline is not None and time.monotonic() - self._request.arrived > self._deadline:
            raise RoundAborted(
                f"the round was aborted: it is over at the server, {self._deadline:g} s after it arrived"
            )

    def progress(self, micro_batches: int) -> None:
        self._progress.micro_batch(micro_batches)


class Worker:
    """One rank of a site's trainer.

    Args:
        name: of the site.
        state: folder of what is kept between rounds.
        args: of `nanofed federate`.

    Raises:
        ConfigError: the arguments or devices are wrong, or a batch does not divide into these devices'.
        DataError: shards or tokenizer are.
    """

    def __init__(self, name: str, state: Path, args: Sequence[str]) -> None:
        if not SAFE_NAME.fullmatch(name):
            raise ConfigError(f"--name {name!r} is no plain word of letters, digits, '.', '_' and '-'")
        self._name = name
        arguments = Arguments.from_args(args)
        self._module, self._data = arguments.build()
        self._fabric = _fabric(arguments)
        self._fabric.launch()
        if arguments.federation.global_batch_tokens is None:  # else it depends on who else is there
            accumulation_steps(
                self._module.recipe.batch_tokens,
                device_batch_size=self._data.device_batch_size,
                sequence_len=self._data.sequence_len,
                world_size=self._fabric.world_size,
            )
        self._trainer = FabricTrainer(self._module, self._data, self._fabric, state, durable=True)
        self._unwritten = 0  # states, after the last round

    @property
    def ranks(self) -> int:
        """How many ranks train together."""
        return self._trainer.ranks.size

    def hello(self) -> dict[str, Any]:
        """Return what the site says of itself."""
        return self._trainer.hello(self._name).to_config()

    @FrozenObjects()
    def follow(self) -> None:
        """Do what the first rank does, round after round."""
        while True:
            instructions, asked = _read(*self._trainer.ranks.from_first(("", {})))
            try:
                if asked is not None:
                    self._trainer.evaluate([], asked)
                if instructions is not None:
                    self._trainer.fit([], instructions)
            except Agreed as error:  # the first rank tells
                logger.debug("%s", error)

    @FrozenObjects()
    def lead(self, listener: Listener, progress: Progress) -> None:
        """Train round after round from the socket.

        Raises:
            Exception: one that leaves ranks or a device in an unknown state: the process has to be started anew.
        """
        while True:
            request = listener.next()
            try:
                self._round(request, progress)
            except (Agreed, Refused) as error:
                logger.warning("%s", error)
                request.refuse(str(error))
            except Exception as error:
                for_people = isinstance(error, (NanofedError, WireError))
                logger.warning("the round failed: %s", error, exc_info=not for_people)
                request.refuse(str(error) if for_people else f"{type(error).__name__}: {error}")
                if self.ranks > 1 or not (for_people or self._is_sound(error)):
                    raise
            progress.idle()

    def _is_sound(self, error: Exception) -> bool:
        """Tell whether the device is of use after an error: one of its own stays with it."""
        return self._fabric.device.type == "cpu" or isinstance(error, torch.OutOfMemoryError)

    def _round(self, request: Request, progress: Progress) -> None:
        message = request.config.get("message")
        try:
            progress.check_name(request.config)
            instructions, asked = _read(request.kind, message)
        except (ChannelError, WireError) as error:
            raise Refused(str(error)) from error
        for part in (instructions, asked):
            if part is not None and part.client != self._name:
                raise Refused(f"instructions for {part.client!r} reached site {self._name!r}")
        turn = _Turn(request, progress, instructions.deadline_seconds if instructions else None)
        self._trainer.ranks.from_first((request.kind, message))
        metrics: dict[str, Any] = {}
        evaluation: Evaluation | None = None
        if asked is not None:
            progress.evaluating(asked.run, asked.round)
            evaluation = self._trainer.evaluate(request.arrays, asked, turn)
            turn.arrived += evaluation.seconds  # the training's budget runs from here on
            metrics = evaluation.to_config()

        def answer(payload: Arrays, report: Report | None = None) -> None:
            sent, count = dict(metrics), evaluation.bytes if evaluation else 0
            if report is not None:
                sent, count = sent | report.to_config(), report.tokens
                self._say(report, progress)
            unwritten, before = self._trainer.states.unwritten, self._unwritten
            self._unwritten = unwritten
            if unwritten > before:  # since the last answer
                sent[UNWRITTEN] = True
            progress.idle()
            request.answer(room.packed(payload), count, sent)

        with MemoryRoom() as room:
            if instructions is None:
                answer([])
                return
            micro_batch = self._data.device_batch_size * self._data.sequence_len * self.ranks
            progress.begin(instructions.run, instructions.round, max(1, instructions.batch_tokens // micro_batch))
            self._trainer.fit(request.arrays, instructions, turn, room, answer)
            progress.saved(self._trainer.states.unwritten)

    def _say(self, report: Report, progress: Progress) -> None:
        speed = report.tokens / report.seconds if report.seconds > 0 else 0.0
        progress.trained(report.steps, speed)
        logger.info(
            "round %d: %d steps, loss %.4f to %.4f, %.0f tokens/s",
            report.round,
            report.steps,
            report.loss_first,
            report.loss_last,
            speed,
        )


def _read(kind: str, message: Any) -> tuple[Instructions | None, Evaluate | None]:
    """Return what a message asks for: a round, perhaps with an evaluation before it, or an evaluation alone.

    Raises:
        WireError: it is no such message.
    """
    if kind == "evaluate":
        return None, Evaluate.from_config(message)
    return Instructions.from_config(message), Evaluate.asked_in(message)


def _fabric(arguments: Arguments) -> Fabric:
    """Return the Fabric of this site's devices: torchrun's ranks, or as many as `fabric.devices` says."""
    options = arguments.fabric_options
    devices, machines = runtime.launched_ranks() or (options.devices, 1)
    several = devices * machines > 1
    runtime.warn_of_unused_gpu(options.accelerator)
    with lightning_errors("fabric", building=True):  # devices that are not there
        return Fabric(
            accelerator=options.accelerator,
            devices=devices,
            num_nodes=machines,
            strategy=FabricShardedStrategy(timeout=PATIENCE) if several else "auto",
            plugins=[cluster_environment()],
        )
