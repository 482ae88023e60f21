"""Flower's app in one process: no sockets, no Ray, clients one after another, each with its full budget."""

from __future__ import annotations

import logging
import traceback
import uuid
from collections.abc import Iterable, Mapping, Sequence

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from nanofed.federated.deploy.process import ended_by_signals
from nanofed.federated.federation import Federation
from nanofed.federated.round_line import RoundLine
from nanofed.federated.site.client import client_app
from nanofed.federated.site.progress import Progress
from nanofed.federated.site.ranks import Turn
from nanofed.federated.site.trainer import FabricTrainer
from nanofed.federated.wire.codec import Arrays
from nanofed.federated.wire.messages import Evaluate, Evaluation, Hello, Instructions, Report
from nanofed.terminal import StatusLine
from nanofed.training.run_folder import hold_run
from nanofed.training.summary import Summary

logger = logging.getLogger(__name__)

CLIENT_FAILED = 1
SERVER_NODE = 0


class ObservedTrainer:
    """A trainer of clients that take turns, which says how far each of them is.

    Attributes:
        progress: how far each client is, by name.
    """

    def __init__(self, trainer: FabricTrainer, clients: Sequence[str]) -> None:
        self.progress = {client: Progress(None) for client in clients}
        self._trainer = trainer
        for progress in self.progress.values():
            progress.say(state="idle")

    def hello(self, client: str) -> Hello:
        """Say who a client is and what it runs."""
        return self._trainer.hello(client)

    def fit(self, arrays: Arrays, instructions: Instructions) -> tuple[Arrays, Report]:
        """Train a client's round."""
        progress = self.progress[instructions.client]
        progress.begin(instructions)
        try:
            return self._trainer.fit(arrays, instructions, Turn(progress))
        finally:
            progress.say(state="idle")

    def evaluate(self, arrays: Arrays, asked: Evaluate) -> Evaluation:
        """Measure weights for a client."""
        progress = self.progress[asked.client]
        progress.say(state="evaluating")
        try:
            return self._trainer.evaluate(arrays, asked)
        finally:
            progress.say(state="idle")


class InProcessGrid(Grid):
    """A Grid whose nodes are contexts of one ClientApp: a message is handled when its reply is pulled, one a call.

    So at most one client's weights are in memory beside the server's, and a round's clients share one machine without
    sharing its clock.

    Where clients are merged one by one, replies come in the order in which clients of these speeds would have them, each on a
    machine of its own: a message that is sent at a time t of theirs is answered at t + tokens / speed, or after the seconds that
    it asks for. It is handled then, for the time until its reply is known before.

    Args:
        app: the ClientApp.
        names: The names of the clients; the n-th client, from 0, is node n + 1.
        speeds: Tokens of each client in a unit of time; None to answer messages as they are pulled.
    """

    def __init__(self, app: ClientApp, names: Sequence[str], speeds: Sequence[float] | None = None) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER_NODE  # Message() reads them
        self._app = app
        self._run = Run.create_empty(run_id=1)
        self._contexts = {
            node: Context(run_id=1, node_id=node, node_config={"name": name}, state=RecordDict(), run_config={})
            for node, name in enumerate(names, start=1)
        }
        self._inbox: dict[str, Message] = {}
        self._speeds = None if speeds is None else dict(enumerate(speeds, start=1))
        self._time = 0.0  # of the last reply
        self._ready: dict[str, float] = {}  # message -> the time of its reply, in the order of the messages

    def set_run(self, run: Run) -> None:
        """Keep the run that Flower describes."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Build a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages in and return their ids."""
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id  # as Flower's own grids do
            self._inbox[message_id] = message
            if self._speeds is not None:
                self._ready[message_id] = self._time + self._duration(message, self._speeds)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the next client handle its message, and return its reply."""
        for message_id in message_ids:
            if self._ready and message_id != min(self._ready, key=self._ready.__getitem__):
                continue
            message = self._inbox.pop(message_id, None)
            if message is not None:
                self._time = self._ready.pop(message_id, self._time)
                return [self._handle(message)]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return their replies."""
        return [reply for message_id in self.push_messages(messages) for reply in self.pull_messages([message_id])]

    def _duration(self, message: Message, speeds: Mapping[int, float]) -> float:
        if message.metadata.message_type != MessageType.TRAIN:
            return 0.0
        asked = Instructions.from_config(message.content.config_records["fitins.config"])
        tokens = asked.max_steps * asked.batch_tokens
        return tokens / speeds[message.metadata.dst_node_id] if asked.seconds is None else asked.seconds

    def _handle(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._app(message, context)
        except Exception as error:  # as on a real site, a client's failure is a reply
            logger.debug("client %s: %s", context.node_config["name"], traceback.format_exc())
            return Message(Error(CLIENT_FAILED, f"{type(error).__name__}: {error}"), reply_to=message)


def run_in_process(federation: Federation) -> Summary:
    """Run clients and server in this process, clients one after another, and return what the run came to.

    Raises:
        ConfigError: another process uses the run.
    """
    with ended_by_signals(), hold_run(federation.folder):
        federation.check()
        config = federation.federation
        trainer = ObservedTrainer(federation.trainer(), config.client_names)
        speeds = (config.client_speeds or [1.0] * config.clients) if config.asynchronous else None
        grid = InProcessGrid(client_app(lambda context: trainer), config.client_names, speeds)
        loop = federation.loop(grid)
        federation.write()
        line = RoundLine(
            lambda: loop.status.said,
            lambda: {client: progress.figures for client, progress in trainer.progress.items()},
            speeds=dict(zip(config.client_names, config.client_speeds or [1.0] * config.clients, strict=True)),
        )
        try:
            with StatusLine(line):
                loop.train()
        finally:
            loop.metrics.close()
        return loop.metrics.summary
