"""What a SuperLink answers a site: each call is bound to the node that signed it, and to what that node was sent.

Flower checks who calls, and then takes the call at its word: with its own key a site could send messages in the server's name to
other sites, answer, fetch and delete what others were sent, and fill memory and database. Here a node may answer a message that
it was sent itself, once, and may fetch and confirm no others'. The rules know nothing of Flower; `bind` puts them before its
handlers, in the SuperLink's process, where all of a site's calls arrive.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from nanofed.errors import NanofedError
from nanofed.federated.deploy.admission import Bucket
from nanofed.federated.wire.plain_text import plain

logger = logging.getLogger(__name__)

CALLS, CALL_BURST = 50.0, 500  # a second and node
HEARTBEAT_SECONDS = 60.0  # Flower's SuperNodes say 30; a node counts as there for twice as long after its last one
SENT = 64  # messages to a node that it may still answer: those sent last
PUSHES = 16  # of the answer to one message: a SuperNode tries again where it gets no reply
OBJECTS = 64  # in an answer; those of ours have about ten, whatever the model: weights travel beside them
BODY_BYTES = 16 << 10  # of what an answer says beside its objects
HELD_BYTES = (
    64 << 20
)  # of a node's answers that the round loop has not taken; a report is 16 MB at most, most are 100 kB
HELD = 8  # answers of a node that the round loop has not taken; older ones are dropped
SHORT = 256  # characters of a name in an answer
ERROR = 2000  # characters of an error
NODES = 4096  # remembered at a time
LOG_SECONDS = 60.0  # between two lines about the same node and reason
OBJECT_ID = re.compile("[0-9a-f]{64}")


class RefusedCall(Exception):
    """A call is not answered; the message says why."""


class TooMany(RefusedCall):
    """There are too many calls: it may be made again."""


@dataclass(frozen=True)
class Asked:
    """A message that a node was sent.

    Attributes:
        run: of Flower.
        group: its group id.
        kind: its message type.
        objects: ids of what is in it.
    """

    run: int
    group: str
    kind: str
    objects: frozenset[str]


@dataclass(frozen=True)
class Answer:
    """What a node calls the answer to a message.

    Attributes:
        message: its own id: that of its outermost object.
        reply_to: id of the message that it answers.
        run: of Flower.
        source: node that it says it comes from.
        target: node that it says it goes to.
        group: its group id.
        kind: its message type.
        numbers: its time, its time to live, and how long it took, in seconds.
        objects: ids of what is in it.
        size: bytes of what it says beside.
    """

    message: str
    reply_to: str
    run: int
    source: int
    target: int
    group: str
    kind: str
    numbers: tuple[float, ...]
    objects: Collection[str]
    size: int


@dataclass
class _Session:
    """The objects of an answer that is being pushed."""

    run: int
    message: str
    pending: set[str]
    size: int = 0


@dataclass
class _Node:
    calls: Bucket = field(default_factory=lambda: Bucket(CALLS, CALL_BURST))
    sent: OrderedDict[str, Asked] = field(default_factory=OrderedDict)
    answered: dict[str, str] = field(default_factory=dict)  # message -> its answer
    pushes: dict[str, int] = field(default_factory=dict)  # message -> tries to answer it
    sessions: OrderedDict[str, _Session] = field(default_factory=OrderedDict)


class FleetRules:
    """What each node was sent and has answered, and whether it may make a call.

    Args:
        server: the node id under which the round loop sends its messages.
    """

    def __init__(self, server: int) -> None:
        self._server = server
        self._nodes: OrderedDict[object, _Node] = OrderedDict()

    def call(self, node: object) -> None:
        """Count a call of a node (or of a key that has none yet).

        Raises:
            TooMany: it makes too many.
        """
        if self._of(node).calls.take() is None:
            raise TooMany(f"it makes more than {CALLS:.0f} calls a second")

    def heartbeat(self, interval: float) -> None:
        """Check what a node says of the time between two of its heartbeats.

        Raises:
            RefusedCall: it is too long: a node that is gone would seem to be there.
        """
        if not 0 < interval <= HEARTBEAT_SECONDS:
            raise RefusedCall(f"it announces a heartbeat every {interval:g} s: {HEARTBEAT_SECONDS:.0f} s are the most")

    def delivered(self, node: int, message: str, asked: Asked) -> None:
        """Note that a node was sent a message."""
        known = self._of(node)
        known.sent[message] = asked
        while len(known.sent) > SENT:
            old, _ = known.sent.popitem(last=False)
            known.answered.pop(old, None)
            known.pushes.pop(old, None)

    def run(self, node: int, run: int) -> None:
        """Check that a node was sent a message of a run.

        Raises:
            RefusedCall: it was not.
        """
        if all(asked.run != run for asked in self._of(node).sent.values()):
            raise RefusedCall("it asks for a run of which it was sent nothing")

    def fetch(self, node: int, run: int, object_id: str) -> None:
        """Check that an object is in a message that a node was sent.

        Raises:
            RefusedCall: it is not.
        """
        if not any(asked.run == run and object_id in asked.objects for asked in self._of(node).sent.values()):
            raise RefusedCall("it asks for an object that is in no message to it")

    def confirm(self, node: int, run: int, message: str) -> None:
        """Check that a node was sent a message that it says it has received.

        Raises:
            RefusedCall: it was not.
        """
        asked = self._of(node).sent.get(message)
        if asked is None or asked.run != run:
            raise RefusedCall("it confirms a message that it was not sent")

    def answer(self, node: int, answer: Answer) -> None:
        """Check that a node may answer a message, and that the answer is one.

        Raises:
            RefusedCall: it may not, or it is none.
        """
        known = self._of(node)
        asked = known.sent.get(answer.reply_to)
        if answer.source != node:
            raise RefusedCall("it answers in another node's name")
        if answer.target != self._server:
            raise RefusedCall("it sends a message to another than the server")
        if asked is None:
            raise RefusedCall("it answers a message that it was not sent")
        if (answer.run, answer.group, answer.kind) != (asked.run, asked.group, asked.kind):
            raise RefusedCall("its answer is of another run, group or kind than the message")
        if not all(math.isfinite(number) and 0 <= number < 1e10 for number in answer.numbers):
            raise RefusedCall("its answer's times are none")
        if len(answer.objects) > OBJECTS or answer.size > BODY_BYTES:
            raise RefusedCall(
                f"its answer has more than {OBJECTS} objects, or more than {BODY_BYTES} bytes beside them"
            )
        if not all(OBJECT_ID.fullmatch(name) for name in (answer.message, *answer.objects)):
            raise RefusedCall("an id in its answer is none")
        if known.answered.get(answer.reply_to, answer.message) != answer.message:
            raise RefusedCall("it answers a message twice")
        known.pushes[answer.reply_to] = known.pushes.get(answer.reply_to, 0) + 1
        if known.pushes[answer.reply_to] > PUSHES:
            raise RefusedCall(f"it has announced the answer to one message {PUSHES} times")

    def accepted(self, node: int, answer: Answer, session: str, missing: Iterable[str]) -> list[str]:
        """Note that an answer was taken, of which some objects are to follow, and return older answers to be dropped."""
        known = self._of(node)
        known.answered[answer.reply_to] = answer.message
        known.sessions[session] = _Session(answer.run, answer.message, set(missing))
        dropped = []
        while len(known.sessions) > HELD:
            _, old = known.sessions.popitem(last=False)
            dropped.append(old.message)
        return [message for message in dropped if all(s.message != message for s in known.sessions.values())]

    def push(self, node: int, run: int, session: str, object_id: str, size: int, held: Callable[[str], bool]) -> None:
        """Check that a node may push an object of an answer.

        Args:
            node: that calls.
            run: of Flower, as it says.
            session: that it was given with its answer.
            object_id: of the object.
            size: bytes of it.
            held: tells whether an answer is still there, not yet taken by the round loop.

        Raises:
            RefusedCall: it announced no such object, or fills the server's disk.
        """
        known = self._of(node)
        of = known.sessions.get(session)
        if of is None or of.run != run or object_id not in of.pending:
            raise RefusedCall("it pushes an object that it has not announced")
        for name in [name for name, other in known.sessions.items() if other is not of and not held(other.message)]:
            del known.sessions[name]
        if sum(other.size for other in known.sessions.values()) + size > HELD_BYTES:
            raise RefusedCall(f"its answers have more than {HELD_BYTES >> 20} MB")

    def pushed(self, node: int, session: str, object_id: str, size: int) -> None:
        """Note that an object was stored."""
        if (of := self._of(node).sessions.get(session)) is not None and object_id in of.pending:
            of.pending.remove(object_id)
            of.size += size

    def _of(self, node: object) -> _Node:
        known = self._nodes.setdefault(node, _Node())
        self._nodes.move_to_end(node)
        while len(self._nodes) > NODES:
            self._nodes.popitem(last=False)
        return known


def _ids(tree: Any) -> Iterator[str]:
    """Yield the ids of a tree of objects."""
    waiting = [tree]
    while waiting:
        found = waiting.pop()
        yield str(found.object_id)
        waiting.extend(found.children)


def _answer(request: Any) -> Answer:
    """Return what a request calls an answer.

    Raises:
        RefusedCall: it is not one message with its objects.
    """
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise RefusedCall("it sends another number of messages than one")
    if len(request.clientapp_runtime_list) > 1:
        raise RefusedCall("its answer has more than one time")
    message, tree = request.messages_list[0], request.message_object_trees[0]
    said = message.metadata
    objects = list(itertools.islice(_ids(tree), OBJECTS + 1))
    if tree.object_id != said.message_id:
        raise RefusedCall("its answer's id is not that of its objects")
    return Answer(
        message=said.message_id,
        reply_to=said.reply_to_message_id,
        run=said.run_id,
        source=said.src_node_id,
        target=said.dst_node_id,
        group=said.group_id,
        kind=said.message_type,
        numbers=(said.created_at, said.ttl, *request.clientapp_runtime_list),
        objects=objects,
        size=request.ByteSize() - tree.ByteSize(),
    )


def bind(
    handlers: Any, rules: FleetRules, refuse: Callable[[RefusedCall], NoReturn], name: Callable[[int], str] = str
) -> None:
    """Put the rules before Flower's handlers of a site's calls.

    Args:
        handlers: Flower's module of them.
        rules: of all nodes.
        refuse: raises what Flower answers a refused call with.
        name: returns what a node is called in the log.

    Raises:
        NanofedError: this Flower is another one than was made for.
    """
    lock = threading.Lock()
    said: OrderedDict[tuple[object, str], float] = OrderedDict()

    def say(node: object, call: str, refused: RefusedCall) -> None:
        key, now = (node, str(refused)), time.monotonic()
        if now - said.get(key, -LOG_SECONDS) >= LOG_SECONDS:
            said[key] = now
            who = name(node) if isinstance(node, int) else "one that has no node yet"
            logger.warning("%s of %s is refused: %s", call, plain(who, SHORT), plain(refused))
        while len(said) > NODES:
            said.popitem(last=False)

    def guard(
        call: str,
        before: Callable[[Any, Any, Any], Any] = lambda node, request, state: None,
        after: Callable[[Any, Any, Any, Any, Any], None] = lambda node, request, state, response, found: None,
        caller: Callable[[Any], object] = lambda request: request.node.node_id,
    ) -> None:
        flowers = getattr(handlers, call, None)
        if not callable(flowers):
            raise NanofedError(
                f"this version of Flower answers sites in another way: {handlers.__name__} has no {call}"
            )

        @functools.wraps(flowers)
        def handler(*, request: Any, state: Any, **others: Any) -> Any:
            node = caller(request)
            try:
                with lock:
                    rules.call(node)
                    found = before(node, request, state)
            except RefusedCall as refused:
                with lock:
                    say(node, call, refused)
                refuse(refused)
            response = flowers(request=request, state=state, **others)
            after(node, request, state, response, found)
            return response

        setattr(handlers, call, handler)

    def heartbeat(node: object, request: Any, state: Any) -> None:
        rules.heartbeat(request.heartbeat_interval)

    def run(node: int, request: Any, state: Any) -> None:
        rules.run(node, request.run_id)

    def bundle(node: int, request: Any, state: Any) -> None:
        rules.run(node, request.run_id)
        if not OBJECT_ID.fullmatch(request.hash_str):  # Flower logs it
            raise RefusedCall("it asks for a bundle by what is no hash")

    def delivered(node: int, request: Any, state: Any, response: Any, found: None) -> None:
        for message, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            of = message.metadata
            asked = Asked(of.run_id, of.group_id, of.message_type, frozenset(_ids(tree)))
            with lock:
                rules.delivered(node, of.message_id, asked)

    def answer(node: int, request: Any, state: Any) -> Answer:
        for message in request.messages_list:
            if message.HasField("error"):
                message.error.reason = message.error.reason[:ERROR]
        found = _answer(request)
        rules.answer(node, found)
        return found

    def accepted(node: int, request: Any, state: Any, response: Any, found: Answer) -> None:
        with lock:
            dropped = rules.accepted(node, found, response.session_id, response.objects_to_push)
        for message in dropped:  # the database may have to be waited for: not while others wait for the lock
            state._on_push_session_expired({message})
            state.object_store.delete(message)

    def push(node: int, request: Any, state: Any) -> None:
        size, held = len(request.object_content), state.object_store.__contains__
        rules.push(node, request.run_id, request.session_id, request.object_id, size, held)

    def pushed(node: int, request: Any, state: Any, response: Any, found: None) -> None:
        if response.stored:
            with lock:
                rules.pushed(node, request.session_id, request.object_id, len(request.object_content))

    guard("activate_node", heartbeat, caller=lambda request: request.public_key)
    guard("deactivate_node", caller=lambda request: request.node_id)
    guard("send_node_heartbeat", heartbeat)
    guard("pull_messages", after=delivered)
    guard("push_messages", answer, accepted)
    guard("get_run", run)
    guard("get_fab", bundle)
    guard("push_object", push, pushed)
    guard("pull_object", lambda node, request, state: rules.fetch(node, request.run_id, request.object_id))
    guard(
        "confirm_message_received",
        lambda node, request, state: rules.confirm(node, request.run_id, request.message_object_id),
    )
