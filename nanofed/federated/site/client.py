"""What a site exposes to Flower: one NumPyClient over a LocalTrainer, the same in every runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from nanofed.errors import NanofedError
from nanofed.federated.site.trainer import ClientFailure, LocalTrainer
from nanofed.federated.wire.codec import Arrays
from nanofed.federated.wire.messages import LIFE, Evaluate, Failure, Instructions, StoredWeights
from nanofed.federated.wire.plain_text import SAFE_NAME
from nanofed.federated.wire.weights_client import RoundOver, WeightsClient

READ = (".metrics", ".properties")  # how the names of those records end, beside the weights, that the server reads


def client_name(context: Context) -> str:
    """Return the client's name from its node's config: `name`, or `client-<partition-id>` in a simulation.

    Flower's node ids change with every restart and are no identity.

    Raises:
        ValueError: neither is there, or the name is no plain word.
    """
    config = context.node_config
    name = str(config.get("name") or (f"client-{config['partition-id']}" if "partition-id" in config else ""))
    if not SAFE_NAME.fullmatch(name):
        raise ValueError(f"the node's config must give a plain `name`, not {name!r}")
    return name


def client_app(trainer: Callable[[Context], LocalTrainer], weights: WeightsClient | None = None) -> ClientApp:
    """Return a ClientApp whose NumPyClient drives `trainer(context)`, which is called for every message."""

    def client_fn(context: Context) -> Client:
        return TrainerClient(trainer(context), client_name(context), weights).to_client()

    return ClientApp(client_fn=client_fn, mods=[refuse_late, spare_records])


def refuse_late(message: Message, context: Context, handle: ClientAppCallable) -> Message:
    """Refuse a round that was over when its message arrived: trained in vain, it would hold up the next one.

    The age is the difference of two machines' clocks. Where they disagree by more than a round, the deadline in the
    instructions, which counts from the arrival, is what is left.

    Raises:
        NanofedError: the round is over.
    """
    metadata = message.metadata
    age = time.time() - metadata.created_at
    if metadata.message_type.partition(".")[0] == MessageType.TRAIN and age > metadata.ttl / LIFE:
        raise NanofedError(f"round {metadata.group_id} arrived {age:.0f} s after it was sent: it is over")
    return handle(message, context)


def spare_records(message: Message, context: Context, handle: ClientAppCallable) -> Message:
    """Send back only what the server reads, and give Flower the empty weights of a message that has none.

    Flower moves each record of a message, and each array in it, in calls of their own, of 10 ms each at the SuperLink. A
    NumPyClient answers with four records, of which one holds an empty array in the place of weights that are not in the message.
    """
    for name in list(message.content.config_records):
        message.content.setdefault(name.replace("ins.config", "ins.parameters"), ArrayRecord())
    reply = handle(message, context)
    if reply.has_content():
        weights = {name: record for name, record in reply.content.array_records.items() if _holds_data(record)}
        figures = {name: record for name, record in reply.content.config_records.items() if name.endswith(READ)}
        reply.content = RecordDict({**weights, **figures})
    return reply


def _holds_data(record: ArrayRecord) -> bool:
    return any(array.data for array in record.values())


class TrainerClient(NumPyClient):
    """Hands each message to the trainer and its answer back.

    Args:
        name: The client's name; instructions for another are refused.
        weights: It fetches and delivers weights, for messages that only name them.
    """

    def __init__(self, trainer: LocalTrainer, name: str, weights: WeightsClient | None = None) -> None:
        self._trainer = trainer
        self._name = name
        self._weights_client = weights
        self._arrived = time.monotonic()

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        """Answer the server's hello."""
        return self._trainer.hello(self._name).to_config()

    def fit(self, parameters: Arrays, config: dict[str, Any]) -> tuple[Arrays, int, dict[str, Any]]:
        """Train one round; the tokens stand where Flower expects the number of examples.

        Where the weights that came are to be evaluated as well, that is done first, and is none of the training's time.
        """
        instructions = Instructions.from_config(config)
        self._check_name(instructions.client)
        asked = Evaluate.found_in(config)
        stored = StoredWeights.found_in(config)
        arrays = self._weights(parameters, stored)
        measured: dict[str, Any] = {}
        try:
            if asked is not None:
                began = time.monotonic()
                measured = self._evaluate(arrays, asked)[2]
                if (deadline := instructions.deadline_seconds) is not None:
                    instructions = replace(instructions, deadline_seconds=deadline - (time.monotonic() - began))
            trained, report = self._trainer.fit(arrays, instructions)
        except NanofedError as error:
            failure = error if isinstance(error, ClientFailure) else error.__cause__  # of an error that ranks agreed on
            if not isinstance(failure, ClientFailure):
                raise
            return [], 0, Failure(**instructions.repeated(), kind=failure.kind, reason=str(error)).to_config()
        if stored is not None and self._weights_client is not None:
            with suppress(RoundOver):  # then the answer is late, and the server will say so
                self._weights_client.deliver(stored, trained, self._arrived + stored.seconds)
            trained = []
        return trained, report.tokens, report.to_config() | measured

    def evaluate(self, parameters: Arrays, config: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
        """Evaluate weights: the answer is in the metrics."""
        return self._evaluate(self._weights(parameters, StoredWeights.found_in(config)), Evaluate.from_config(config))

    def _weights(self, parameters: Arrays, stored: StoredWeights | None) -> Arrays:
        """Return the weights that came in the message, or those that it names."""
        if stored is None:
            return parameters
        if self._weights_client is None:
            raise NanofedError("the message names weights at a server, and this client has no way there")
        return self._weights_client.fetch(stored, self._arrived + stored.seconds)

    def _evaluate(self, arrays: Arrays, asked: Evaluate) -> tuple[float, int, dict[str, Any]]:
        self._check_name(asked.client)
        evaluation = self._trainer.evaluate(arrays, asked)
        return evaluation.nats, evaluation.bytes, evaluation.to_config()

    def _check_name(self, client: str) -> None:
        if client != self._name:
            raise ValueError(f"instructions for {client!r} reached client {self._name!r}")
