"""How a site's worker takes messages from its SuperNode and hands its answers back.

The SuperNode runs with `--isolation process`: a message that reaches it waits there as a task, at an HTTP interface on
loopback, until a process that knows the site's secret takes it. Flower's own taker starts a process for every message; here
the process that trains takes them itself, one after another.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime import run_clientapp

from nanofed.errors import NanofedError
from nanofed.federated.flower_patches import ask_again_soon

logger = logging.getLogger(__name__)
ask_again_soon(run_clientapp, "pull_and_inflate_object_from_tree")

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
ACQUIRE_ANY = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
IDLE_PAUSE = 0.1  # seconds between two looks for a message
BUSY_PAUSE = 1.0  # seconds between two heartbeats, and looks for a newer message, while one is worked on


class Task:
    """A message that this process has taken, from its arrival to its answer.

    Attributes:
        cancelled: why nobody wants the answer any more; None as long as somebody does.
    """

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client = client
        self._pull = client.PullObject
        client.PullObject = self._pull_object  # type: ignore[method-assign]
        self.cancelled: str | None = None

    def _pull_object(self, request: PullObjectRequest) -> PullObjectResponse:
        """Pull a part of the message; what a run that has ended left behind never comes, and would be waited for for ever."""
        if self.cancelled is not None:
            raise NanofedError(f"the message is given up: {self.cancelled}")
        return self._pull(request)

    def cancel(self, reason: str) -> None:
        """Say that the answer is not wanted any more; the first reason stays."""
        self.cancelled = self.cancelled or reason

    def receive(self) -> tuple[Message, Context, bytes]:
        """Return the message, the run's context and the app's bundle.

        Raises:
            NanofedError: the task was cancelled before all of the message was there.
            httpx.HTTPError: the SuperNode is gone, or has given the task to nobody any more.
        """
        message, context, _, bundle = run_clientapp.pull_task_input(self._client)
        return message, context, bundle.content

    def heartbeat(self) -> None:
        """Tell the SuperNode that the task is worked on; cancel it where the SuperNode is gone or knows it no more."""
        try:
            if not self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                self.cancel("the SuperNode has given it up")
        except (httpx.ConnectError, httpx.HTTPStatusError):
            self.cancel("its SuperNode is gone")
        except Exception as error:  # it is slow, or the task has just been closed
            logger.debug("a heartbeat failed: %s", error)

    def answer(self, reply: Message, context: Context) -> None:
        """Hand the answer over and end the task.

        Raises:
            httpx.HTTPError: the SuperNode is gone, or has answered for this process.
        """
        run_clientapp.push_message(self._client, reply, context)
        run_clientapp.push_task_output(self._client, None, SubStatus.COMPLETED, "")

    def give_up(self) -> None:
        """End the task without an answer."""
        run_clientapp.push_task_output(self._client, None, SubStatus.FAILED, "the message could not be taken")

    def close(self) -> None:
        """Close the connection to the SuperNode."""
        self._client.close()


class Inbox:
    """Takes a site's messages; a newer one cancels the one that is worked on.

    A thread looks for messages and keeps the SuperNode informed that the one taken is worked on, so that a long round does not
    look like a dead process, and a dead process is noticed within seconds.

    Args:
        address: `host:port` of the SuperNode's runtime API.
        secret: shared with the SuperNode; nobody else on this machine can take messages.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self._address = address
        auth = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE})
        self._supernode = self._connect(auth)
        self._changed = threading.Condition()
        self._waiting: deque[Task] = deque()
        self._current: Task | None = None
        self._said = ""
        threading.Thread(target=self._look, name="nanofed-inbox", daemon=True).start()

    def _connect(self, auth: SuperExecAuthHttpInterceptor | RuntimeTokenHttpInterceptor) -> RuntimeHttpClient:
        interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), auth]
        return RuntimeHttpClient.from_server_address(self._address, True, None, interceptors)

    def next(self) -> Task:
        """Wait for the next message; the task before it is over."""
        with self._changed:
            if self._current is not None:
                self._current.close()
            self._current = None
            self._changed.notify_all()  # the thread looks more often now
            while not self._waiting:
                self._changed.wait()
            self._current = self._waiting.popleft()
            return self._current

    def _look(self) -> None:
        while True:
            try:
                token = self._supernode.AcquireTask(ACQUIRE_ANY).token
                self._said = ""
            except Exception as error:  # no SuperNode yet, or none any more: this thread outlives all answers
                if str(error) != self._said:
                    logger.info("no message can be taken from the SuperNode at %s: %s", self._address, error)
                self._said, token = str(error), ""
            with self._changed:
                tasks = [*([] if self._current is None else [self._current]), *self._waiting]
                if token:
                    for task in tasks:
                        task.cancel("a newer message arrived")
                    self._waiting.append(Task(self._connect(RuntimeTokenHttpInterceptor(token))))
                    tasks.append(self._waiting[-1])
                    self._changed.notify_all()
            for task in tasks:
                task.heartbeat()
            with self._changed:
                self._changed.wait(IDLE_PAUSE if self._current is None else BUSY_PAUSE)
