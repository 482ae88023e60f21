"""The ClientApp that a site's SuperNode starts anew for every message: it hands the message to the site's trainer.

The weights that a message names it fetches for the trainer, and delivers what comes back.

Its imports are what every round waits for: Flower's and NumPy, neither torch nor lightning (a test looks).
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Context, Message, MessageType
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from nanofed.federated.site.channel import ChannelError, Packed, call
from nanofed.federated.site.freight import Over, Road
from nanofed.federated.wire.freight import FREIGHT, Freight
from nanofed.federated.wire.lateness import is_over

WAIT = 120.0  # seconds for a trainer that starts, or is started anew; the node's config may say otherwise


class ChannelClient(NumPyClient):
    """Passes each message to the trainer behind a socket, and its answer back.

    Weights that a message only names are fetched first, and so delivered where they are answered with.

    Args:
        name: of the site; the trainer refuses another's.
        trainer: its socket.
        road: to the server's depot; None where weights come in the messages.
        wait: seconds for the trainer to be there.
    """

    def __init__(self, name: str, trainer: Path, road: Road | None = None, wait: float = WAIT) -> None:
        self._name = name
        self._trainer = trainer
        self._road = road
        self._wait = wait

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        """Answer the server's hello."""
        return self._call("get_properties", config)[2]

    def fit(
        self, parameters: list[npt.NDArray[np.generic]], config: dict[str, Any]
    ) -> tuple[list[npt.NDArray[np.generic]], int, dict[str, Any]]:
        """Have one round trained."""
        return self._call("fit", config, parameters)

    def evaluate(
        self, parameters: list[npt.NDArray[np.generic]], config: dict[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        """Have weights measured; the answer is in the metrics, where a `fit` that asks for it has it too."""
        _, count, metrics = self._call("evaluate", config, parameters)
        return 0.0, count, metrics

    def _call(
        self, kind: str, config: dict[str, Any], arrays: list[npt.NDArray[np.generic]] | None = None
    ) -> tuple[list[npt.NDArray[np.generic]], int, dict[str, Any]]:
        try:
            freight = Freight.found_in(config)
            if freight is None:
                return self._hand_over(kind, config, arrays or [])
            if self._road is None:
                raise ChannelError("the message names weights in a depot, and the node's config names no server")
            plain = {key: value for key, value in config.items() if key != FREIGHT}
            answer, count, metrics = self._hand_over(kind, plain, self._road.fetch(freight))
            if freight.answer:
                with suppress(Over):  # then the answer is late, and the server will say so
                    self._road.deliver(freight, answer)
            return [], count, metrics
        except (ChannelError, ValueError) as error:
            raise ChannelError(f"site {self._name}: {error}") from error

    def _hand_over(
        self, kind: str, config: dict[str, Any], arrays: list[npt.NDArray[np.generic]] | Packed
    ) -> tuple[list[npt.NDArray[np.generic]], int, dict[str, Any]]:
        return call(self._trainer, kind, {"client": self._name, "message": dict(config)}, arrays, self._wait)


def client_fn(context: Context) -> Client:
    """Return the client of a node whose config has `name` and `trainer` (the socket's path).

    It may have `server` (`host:port`), `authority` and `key` (paths) as well, for weights in a depot, and `trainer_wait`.

    Raises:
        ValueError: it lacks `name` or `trainer`.
    """
    config = context.node_config
    missing = [key for key in ("name", "trainer") if not config.get(key)]
    if missing:
        raise ValueError(f"the node's config lacks {' and '.join(missing)}: flower-supernode --node-config gives it")
    wait = float(config.get("trainer_wait", WAIT))
    authority, key = (Path(str(config[name])) if config.get(name) else None for name in ("authority", "key"))
    road = Road(str(config["server"]), authority, key) if config.get("server") else None
    return ChannelClient(str(config["name"]), Path(str(config["trainer"])), road, wait).to_client()


def pass_over(message: Message, context: Context, handle: ClientAppCallable) -> Message:
    """Refuse a round that was over when it arrived: trained in vain, it would hold up the next one.

    The age is the difference of two machines' clocks. Where they disagree by more than a round, the trainer's own clock, which
    runs from the message's arrival, is what is left.

    Raises:
        ChannelError: it is.
    """
    metadata = message.metadata
    age = time.time() - metadata.created_at
    if metadata.message_type.partition(".")[0] == MessageType.TRAIN and is_over(age, metadata.ttl):
        name = context.node_config.get("name")
        raise ChannelError(f"site {name}: round {metadata.group_id} arrived {age:.0f} s after it was sent: it is over")
    return handle(message, context)


client = ClientApp(client_fn=client_fn, mods=[pass_over])
