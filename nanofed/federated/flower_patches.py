"""Every change that nanofed makes to Flower while it runs, with its reason and the test that fails without it.

Made for flwr 1.41 and 1.42. Each patch looks whether what it replaces is there, and fails in one line where it is not.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode, Status

from nanofed.errors import NanofedError

FIRST_WAIT = 0.1  # seconds
WORKER_WAIT = 0.02  # seconds; looking costs a SuperNode no call
GROWTH = 1.2  # of the wait from one look to the next: 3 s after 19 looks in 17 s
REST_SECONDS = 10.0  # that the next piece of an answer may take, on one machine
TASK_LOOK = 1.0  # seconds between two looks whether a message that has no answer yet is still worked on
HEARTBEAT_SECONDS = 5.0  # a task is given up after two of them without a word; the worker sends one a second


def _need(holds: bool, what: str) -> None:
    if not holds:
        from flwr.supercore.version import package_version

        raise NanofedError(f"flwr {package_version} {what}: nanofed knows 1.41 and 1.42")


def _takes(module: ModuleType, name: str, *parameters: str) -> bool:
    """Tell whether a module has a function of that name with these parameters."""
    call = getattr(module, name, None)
    return call is not None and set(parameters) <= inspect.signature(call).parameters.keys()


class Waits:
    """Python's `time` for a SuperNode's main loop, whose `sleep` waits no longer than it needs to.

    Flower's loop sleeps 3 s between two looks for a message at the SuperLink, and half a second between two looks for its
    worker's answer: of a short round they are most of what is no training. Here it looks at once, then less and less often,
    so a site that waits through a night for a server's quorum costs the server no more than with Flower's own waits.
    """

    def __init__(self) -> None:
        self._idle = 0  # looks in a row that found nothing at the SuperLink

    def sleep(self, seconds: float) -> None:
        """Wait, at most as long as Flower would."""
        if seconds >= 1.0:  # between two looks at the SuperLink
            time.sleep(min(seconds, FIRST_WAIT * GROWTH ** min(self._idle, 100)))
            self._idle += 1
        else:  # for the worker, which has a message
            time.sleep(min(seconds, WORKER_WAIT))
            self._idle = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def look_sooner(start_client_internal: ModuleType) -> None:
    """Give a SuperNode's main loop shorter waits; see `Waits`.

    Test: `tests/federated/test_flower_patches.py::test_waits_grow_to_flowers_and_begin_anew_with_a_message`.

    Raises:
        NanofedError: this version of Flower waits in another way.
    """
    _need(getattr(start_client_internal, "time", None) is time, "waits for messages in another way")
    vars(start_client_internal)["time"] = Waits()


class _Impatient:
    """A SuperNode's object store as the sender of an answer reads it: a piece that does not come is an error."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._missing = ""
        self._since = 0.0

    def get(self, object_id: str) -> Any:
        content = self._store.get(object_id)
        if content != b"":
            return content
        if object_id != self._missing:
            self._missing, self._since = object_id, time.monotonic()
        if time.monotonic() - self._since > REST_SECONDS:
            raise NanofedError(f"the worker has not finished its answer: no more came for {REST_SECONDS:.0f} s")
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class _WatchedTasks:
    """A SuperNode's state as the sender of answers reads it: a message that no task is left for gets an error as its answer.

    Args:
        state: the SuperNode's own.
        found: answers that were found before, which come first.
        insert: It puts an answer, with all of its content, where the sender finds it.
    """

    def __init__(self, state: Any, found: list[Any], insert: Callable[[Message], None]) -> None:
        self._state = state
        self._found = found
        self._insert = insert
        self._looked = time.monotonic()

    def get_messages_legacy(self, **which: Any) -> list[Any]:
        if found := self._found.copy():
            self._found.clear()
            return found
        look = time.monotonic() - self._looked > TASK_LOOK
        # Before the answers: a worker hands its answer over and ends its task after it.
        lost = look and not self._state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING])
        answers = list(self._state.get_messages_legacy(**which))
        if lost and not answers:
            with self._state.lock_msg_store:
                messages = [entry.message for entry in self._state.msg_store.values()]
            for message in messages:
                if not message.metadata.reply_to_message_id:
                    error = Error(ErrorCode.CLIENT_APP_CRASHED, "the worker that took the message works on it no more")
                    self._insert(Message(error, reply_to=message))
        if look:
            self._looked = time.monotonic()
        return answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def send_every_answer(start_client_internal: ModuleType) -> None:
    """Let a SuperNode send every answer that is there, and go on where one will not come.

    Flower sends one answer for each message, the next that is there, and waits for it and for all of its content for ever. A
    site would take part in no round again, while everything seems to be well, in three cases. Here they end:

    - A worker is killed while it hands an answer over: the answer whose rest does not come is given up.
    - A worker is gone before it has read the message that it had taken, or gives its task up: an error is the answer. (Flower
      itself answers for a worker that is killed later.)
    - Flower has answered for a message of an earlier run: the answer to the message that is worked on would wait for the next
      round's message, and so would every later one. It is sent when it is there.

    Tests: `test_an_answer_whose_rest_does_not_come_is_given_up`, `test_a_message_that_no_task_is_left_for_is_answered` and
    `test_an_answer_too_many_does_not_hold_up_those_of_later_rounds` in `tests/federated/test_flower_patches.py`.

    Raises:
        NanofedError: this version of Flower sends answers in another way.
    """
    flower = start_client_internal
    same = (
        _takes(flower, "_pull_and_store_message", "state")
        and _takes(flower, "_push_messages", "state", "object_store")
        and _takes(flower, "_insert_message", "msg", "state", "store")
    )
    _need(same, "sends answers in another way")
    pull, push, insert = flower._pull_and_store_message, flower._push_messages, flower._insert_message
    found: list[Any] = []

    @functools.wraps(pull)
    def pull_message(*, state: Any, **others: Any) -> int | None:
        run_id: int | None = pull(state=state, **others)
        if run_id is None:
            found.extend(state.get_messages_legacy(is_reply=True))
            run_id = int(found[0].metadata.run_id) if found else None
        return run_id  # None: there is nothing to send

    @functools.wraps(push)
    def push_messages(*, state: Any, object_store: Any, **others: Any) -> None:
        watched = _WatchedTasks(state, found, lambda answer: insert(msg=answer, state=state, store=object_store))
        push(state=watched, object_store=_Impatient(object_store), **others)

    vars(flower).update(_pull_and_store_message=pull_message, _push_messages=push_messages)


def notice_dead_workers_sooner(in_memory_corestate: ModuleType) -> None:
    """Let a SuperNode answer for a worker that is dead after 10 s without a heartbeat, not after 60.

    Test: `tests/federated/test_flower_patches.py::test_a_task_without_heartbeats_is_answered_for_soon`.

    Raises:
        NanofedError: this version of Flower watches tasks in another way.
    """
    names = vars(in_memory_corestate)
    _need({"HEARTBEAT_DEFAULT_INTERVAL", "HEARTBEAT_PATIENCE"} <= names.keys(), "watches tasks in another way")
    names["HEARTBEAT_DEFAULT_INTERVAL"] = HEARTBEAT_SECONDS


def ask_again_soon(module: ModuleType, name: str = "pull_objects") -> None:
    """Let one of Flower's modules ask for an object that is not there yet after 50 ms again, and then every second at least.

    A message is there before what is in it; Flower's own waits, for each object, are 1, 2, 4 s and up to 10 s.
    Test: `tests/federated/test_flower_patches.py::test_an_object_that_is_late_is_asked_for_again_soon`.

    Args:
        module: a module of Flower that pulls objects.
        name: name of the function in that module which pulls objects.

    Raises:
        NanofedError: this version of Flower pulls objects in another way.
    """
    pull = getattr(module, name, None)
    _need(callable(pull), f"pulls objects in another way: {module.__name__} does not")
    assert pull is not None
    vars(module)[name] = functools.partial(pull, initial_backoff=0.05, backoff_cap=1.0, max_tries_per_object=None)


def hold_back_unfinished(linkstate: Any, corestate: Any) -> None:
    """Let a SuperLink hand a reply over when all of it is there.

    Flower hands it over once it is announced, and whoever asked then waits for what is in it, three minutes for one that was cut
    off. The round loop takes one reply at a time, so one client with a bad link, or one that announces replies and never sends
    them, would hold up all the others, past the round's end.
    Test: `tests/federated/test_flower_patches.py::test_a_reply_is_handed_over_when_all_of_it_is_there`.

    Args:
        linkstate: Flower's module `sql_linkstate`.
        corestate: Flower's module `sql_corestate`.

    Raises:
        NanofedError: this version of Flower keeps replies in another way.
    """
    tables = ("ObjectPushSessionModel", "ObjectPushSessionRootModel")
    there = hasattr(linkstate, "SqlLinkState") and all(hasattr(corestate, table) for table in tables)
    _need(there, "keeps replies in another way")
    reply, node, state = linkstate.MessageResModel, linkstate.NodeModel, linkstate.SqlLinkState
    upload, root = corestate.ObjectPushSessionModel, corestate.ObjectPushSessionRootModel
    whole, lock, now = state.get_message_res, state._lock_run, linkstate.now

    def get_message_res(self: Any, message_ids: set[str], run_id: int) -> Any:
        under_way = (
            linkstate.select(reply.reply_to_message_id)
            .join(root, root.root_object_id == reply.message_id)
            .join(upload, upload.session_id == root.session_id)
            .join(node, node.node_id == reply.src_node_id)
            .where(
                reply.reply_to_message_id.in_(message_ids),
                upload.pending_count > 0,
                upload.expires_at > now(),  # Flower gives an upload up in which nothing has come for three minutes
                node.online_until > now().timestamp(),  # of one that is gone, Flower says so
            )
        )
        with self.session() as session:
            lock(self, run_id)  # writes: no reply can be announced between the two looks
            held_back = set(session.scalars(under_way))
            return whole(self, message_ids - held_back, run_id)

    state.get_message_res = get_message_res
