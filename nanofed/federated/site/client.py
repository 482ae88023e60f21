"""What a site exposes to Flower: one NumPyClient over a LocalTrainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Context
from flwr.client import NumPyClient

from nanofed.federated.site.trainer import LocalTrainer
from nanofed.federated.wire.evaluation import Evaluate
from nanofed.federated.wire.messages import Instructions
from nanofed.federated.wire.names import SAFE_NAME


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


class TrainerClient(NumPyClient):
    """Hands each message to the trainer and its answer back."""

    def __init__(self, trainer: LocalTrainer, name: str) -> None:
        self._trainer = trainer
        self._name = name

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        """Answer the server's hello."""
        return self._trainer.hello(self._name).to_config()

    def fit(
        self, parameters: list[npt.NDArray[np.generic]], config: dict[str, Any]
    ) -> tuple[list[npt.NDArray[np.generic]], int, dict[str, Any]]:
        """Train one round; the tokens stand where Flower expects the number of examples.

        Where the weights that came are to be measured as well, that is done first, and is none of the training's time.
        """
        instructions = Instructions.from_config(config)
        self._check_name(instructions.client)
        asked = Evaluate.asked_in(config)
        measured = self._evaluate(parameters, asked)[2] if asked else {}
        arrays, report = self._trainer.fit(parameters, instructions)
        return arrays, report.tokens, report.to_config() | measured

    def evaluate(
        self, parameters: list[npt.NDArray[np.generic]], config: dict[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        """Measure weights: the answer is in the metrics."""
        return self._evaluate(parameters, Evaluate.from_config(config))

    def _evaluate(
        self, parameters: list[npt.NDArray[np.generic]], asked: Evaluate
    ) -> tuple[float, int, dict[str, Any]]:
        self._check_name(asked.client)
        evaluation = self._trainer.evaluate(parameters, asked)
        return evaluation.nats, evaluation.bytes, evaluation.to_config()

    def _check_name(self, client: str) -> None:
        if client != self._name:
            raise ValueError(f"instructions for {client!r} reached client {self._name!r}")
