"""A site's SuperNode: Flower's own, which looks for messages more often and does not wait for a client that is dead.

Flower's waits 3 s between two looks, at the SuperLink for a message and half a second at its own client process for an answer:
of a short round they are most of what is no training (`bin/bench round`). Here it looks at once, then less and less often, so
that a site that waits for a server's quorum through a night costs the server no more than Flower's would.

Flower's also waits for the rest of an answer for ever: a client killed while it hands it over would end the site's part
in the federation, while everything seems to be well. And it sends one answer for each message, the next that is there: a client
that answers after Flower has answered for it would make every later answer of the site wait for the next round's message.
"""

from __future__ import annotations

import functools
import inspect
import sys
import time
from typing import Any

from nanofed.errors import NanofedError
from nanofed.federated.flower import ask_again_soon

FIRST_WAIT = 0.1
GROWTH = 1.2  # of the wait from one look to the next: 3 s after 19 looks in 17 s
REST_SECONDS = 30.0  # that the next piece of an answer may take, on one machine


class Clock:
    """Flower's `time`, whose `sleep` waits no longer than it needs to."""

    def __init__(self) -> None:
        self._idle = 0  # looks in a row that found nothing at the SuperLink

    def sleep(self, seconds: float) -> None:
        """Wait, at most as long as Flower would."""
        if seconds >= 1.0:  # between two looks at the SuperLink
            time.sleep(min(seconds, FIRST_WAIT * GROWTH ** min(self._idle, 100)))
            self._idle += 1
        else:  # for the client process on this machine, which has a message
            time.sleep(min(seconds, FIRST_WAIT))
            self._idle = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def quicken(start_client_internal: Any) -> None:
    """Give Flower's main loop of a SuperNode another clock.

    Args:
        start_client_internal: Flower's module of that name.

    Raises:
        NanofedError: this Flower is another one than was made for.
    """
    if getattr(start_client_internal, "time", None) is not time:
        raise NanofedError("this version of Flower waits in another way: nanofed does not know its SuperNode")
    start_client_internal.time = Clock()


class Impatient:
    """Flower's store of what is in messages, for one who takes an answer out of it that a client is still putting in.

    Args:
        store: Flower's.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._missing = ""
        self._since = 0.0

    def get(self, object_id: str) -> Any:
        """Return a piece; an empty one while it is waited for.

        Raises:
            NanofedError: it does not come.
        """
        content = self._store.get(object_id)
        if content != b"":
            return content
        if object_id != self._missing:
            self._missing, self._since = object_id, time.monotonic()
        if time.monotonic() - self._since > REST_SECONDS:
            raise NanofedError(
                f"the client's process has not finished its answer: no more came for {REST_SECONDS:.0f} s"
            )
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def give_up_unfinished(start_client_internal: Any) -> None:
    """Let Flower's main loop of a SuperNode go on without an answer whose rest does not come.

    Args:
        start_client_internal: Flower's module of that name.

    Raises:
        NanofedError: this Flower is another one than was made for.
    """
    push = getattr(start_client_internal, "_push_messages", None)
    if push is None or "object_store" not in inspect.signature(push).parameters:
        raise NanofedError("this version of Flower sends answers in another way: nanofed does not know its SuperNode")

    @functools.wraps(push)
    def push_messages(*, object_store: Any, **others: Any) -> None:
        push(object_store=Impatient(object_store), **others)

    start_client_internal._push_messages = push_messages


class _Found:
    """Flower's state of a SuperNode, for one who sends the answers in it: those that were found already come first.

    Args:
        state: Flower's.
        found: is emptied.
    """

    def __init__(self, state: Any, found: list[Any]) -> None:
        self._state = state
        self._found = found

    def get_messages_legacy(self, **which: Any) -> list[Any]:
        """Return answers that nobody has taken yet."""
        found = self._found.copy()
        self._found.clear()
        return found or list(self._state.get_messages_legacy(**which))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def answer_at_any_time(start_client_internal: Any) -> None:
    """Let Flower's main loop of a SuperNode send an answer also where no message was received before it.

    Args:
        start_client_internal: Flower's module of that name.

    Raises:
        NanofedError: this Flower is another one than was made for.
    """
    pull = getattr(start_client_internal, "_pull_and_store_message", None)
    push = getattr(start_client_internal, "_push_messages", None)
    if pull is None or push is None or not all("state" in inspect.signature(call).parameters for call in (pull, push)):
        raise NanofedError("this version of Flower sends answers in another way: nanofed does not know its SuperNode")
    found: list[Any] = []

    @functools.wraps(pull)
    def pull_message(*, state: Any, **others: Any) -> int | None:
        run_id: int | None = pull(state=state, **others)
        if run_id is None:
            found.extend(state.get_messages_legacy(is_reply=True))
            run_id = int(found[0].metadata.run_id) if found else None
        return run_id  # None: there is nothing to send

    @functools.wraps(push)
    def push_messages(*, state: Any, **others: Any) -> None:
        push(state=_Found(state, found), **others)

    start_client_internal._pull_and_store_message = pull_message
    start_client_internal._push_messages = push_messages


def main() -> None:
    """Run `flower-supernode` with the same arguments."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    quicken(start_client_internal)
    ask_again_soon(start_client_internal)
    give_up_unfinished(start_client_internal)
    answer_at_any_time(start_client_internal)
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
