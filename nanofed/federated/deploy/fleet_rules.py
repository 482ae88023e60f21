"""What a SuperLink answers a site: each call is bound to the node that signed it, and to what that node was sent.

Flower checks who calls, and then takes the call at its word: with its own key a site could send messages in the server's name to
other sites, answer, fetch and delete what others were sent, and fill memory and database. Here a node may answer a message that
it was sent itself, once, and may fetch and confirm no others'. `bind` puts the rules around Flower's handlers, in the SuperLink's
process, where all of a site's calls arrive.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException

from nanofed.errors import NanofedError
from nanofed.federated.deploy.admission import LOG_SECONDS, Bucket, Throttle
from nanofed.federated.wire.plain_text import plain

logger = logging.getLogger(__name__)

CALLS, CALL_BURST = 50.0, 500  # a second and node
HEARTBEAT_SECONDS = 60.0  # Flower's SuperNodes say 30; a node counts as there for twice as long after its last one
SENT = 64  # messages to a node that it may still answer: those sent last
PUSHES = 16  # of the answer to one message: a SuperNode tries again where it gets no reply
OBJECTS = 64  # in an answer; those of ours have about ten, whatever the model: weights travel beside them
BODY_BYTES = 16 << 10  # of what an answer says beside its objects
# Of a node's answers that the round loop has not taken; a report is 16 MB at most, most are 100 kB.
HELD_BYTES = 64 << 20
HELD = 8  # answers of a node that the round loop has not taken; older ones are dropped
SHORT = 256  # characters of a name in a log
ERROR = 2000  # characters of an error
NODES = 4096  # remembered at a time
OBJECT_ID = re.compile("[0-9a-f]{64}")


class RefusedCall(HTTPException):
    """A call is not answered; the detail says why.

    After 403 a SuperNode takes the run for over and goes on, after 503 it makes the call again.
    """

    def __init__(self, detail: str, status: HTTPStatus = HTTPStatus.FORBIDDEN) -> None:
        super().__init__(status, detail)


@dataclass
class _Asked:
    """A message that a node was sent, and the answer."""

    run: int
    group: str
    kind: str
    objects: frozenset[str]  # ids of what is in it
    answer: str = ""  # the answer's id, which is that of its outermost object
    pushes: int = 0  # tries to answer it


@dataclass
class _Upload:
    """The objects of an answer that are being pushed."""

    run: int
    answer: str
    pending: set[str]
    size: int = 0


@dataclass
class _Node:
    calls: Bucket = field(default_factory=lambda: Bucket(CALLS, CALL_BURST))
    asked: OrderedDict[str, _Asked] = field(default_factory=OrderedDict)  # by the message's id
    uploads: OrderedDict[str, _Upload] = field(default_factory=OrderedDict)  # by Flower's session
    lines: Throttle = field(default_factory=lambda: Throttle(LOG_SECONDS))
    lock: threading.Lock = field(default_factory=threading.Lock)


class FleetRules:
    """What each node was sent and has answered, and whether it may make a call: methods that `bind` puts around Flower's.

    Args:
        server: The node id under which the round loop sends its messages.
    """

    def __init__(self, server: int) -> None:
        self._server = server
        self._nodes: OrderedDict[object, _Node] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, caller: object) -> _Node:
        """Return what is known of a node, or of a key that has none yet."""
        with self._lock:
            known = self._nodes.setdefault(caller, _Node())
            self._nodes.move_to_end(caller)
            if len(self._nodes) > NODES:
                self._nodes.popitem(last=False)
            return known

    def heartbeat(self, node: _Node, request: Any, state: Any) -> None:
        """Refuse a long time between two heartbeats: a node that is gone would seem to be there."""
        if not 0 < request.heartbeat_interval <= HEARTBEAT_SECONDS:
            raise RefusedCall(
                f"it announces a heartbeat every {request.heartbeat_interval:g} s: {HEARTBEAT_SECONDS:.0f} s are the most"
            )

    def sent(self, node: _Node, request: Any, state: Any, response: Any) -> None:
        """Note the messages that a node is sent."""
        for message, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            of = message.metadata
            node.asked[of.message_id] = _Asked(of.run_id, of.group_id, of.message_type, frozenset(_ids(tree)))
            if len(node.asked) > SENT:
                node.asked.popitem(last=False)

    def run(self, node: _Node, request: Any, state: Any) -> None:
        """Refuse a run of which a node was sent no message."""
        if all(asked.run != request.run_id for asked in node.asked.values()):
            raise RefusedCall("it asks for a run of which it was sent nothing")

    def bundle(self, node: _Node, request: Any, state: Any) -> None:
        """Refuse the bundle of such a run, and a hash that is none, which Flower would log."""
        self.run(node, request, state)
        if not OBJECT_ID.fullmatch(request.hash_str):
            raise RefusedCall("it asks for a bundle by what is no hash")

    def fetch(self, node: _Node, request: Any, state: Any) -> None:
        """Refuse an object that is in no message to a node."""
        if not any(asked.run == request.run_id and request.object_id in asked.objects for asked in node.asked.values()):
            raise RefusedCall("it asks for an object that is in no message to it")

    def confirm(self, node: _Node, request: Any, state: Any) -> None:
        """Refuse to delete what another node was sent: Flower deletes a message that is confirmed."""
        asked = node.asked.get(request.message_object_id)
        if asked is None or asked.run != request.run_id:
            raise RefusedCall("it confirms a message that it was not sent")

    def answer(self, node: _Node, request: Any, state: Any) -> None:
        """Refuse what is not the one answer to a message that a node was sent; an error's words are cut."""
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise RefusedCall("it sends another number of messages than one")
        if len(request.clientapp_runtime_list) > 1:
            raise RefusedCall("its answer has more than one time")
        message, tree = request.messages_list[0], request.message_object_trees[0]
        of = message.metadata
        asked = node.asked.get(of.reply_to_message_id)
        if of.src_node_id != request.node.node_id:
            raise RefusedCall("it answers in another node's name")
        if of.dst_node_id != self._server:
            raise RefusedCall("it sends a message to another than the server")
        if asked is None:
            raise RefusedCall("it answers a message that it was not sent")
        if (of.run_id, of.group_id, of.message_type) != (asked.run, asked.group, asked.kind):
            raise RefusedCall("its answer is of another run, group or kind than the message")
        if not all(0 <= number < 1e10 for number in (of.created_at, of.ttl, *request.clientapp_runtime_list)):
            raise RefusedCall("its answer's times are none")
        if message.HasField("error"):
            message.error.reason = message.error.reason[:ERROR]
        objects = list(itertools.islice(_ids(tree), OBJECTS + 1))
        if len(objects) > OBJECTS or request.ByteSize() - tree.ByteSize() > BODY_BYTES:
            raise RefusedCall(
                f"its answer has more than {OBJECTS} objects, or more than {BODY_BYTES} bytes beside them"
            )
        if tree.object_id != of.message_id or not all(OBJECT_ID.fullmatch(name) for name in objects):
            raise RefusedCall("its answer's id is not that of its objects, or an id of theirs is none")
        if asked.answer not in ("", of.message_id):
            raise RefusedCall("it answers a message twice")
        asked.pushes += 1
        if asked.pushes > PUSHES:
            raise RefusedCall(f"it has announced the answer to one message {PUSHES} times")

    def announced(self, node: _Node, request: Any, state: Any, response: Any) -> None:
        """Note an answer whose objects are to follow; where the round loop has not taken many, the oldest are dropped."""
        of = request.messages_list[0].metadata
        if asked := node.asked.get(of.reply_to_message_id):
            asked.answer = of.message_id
        node.uploads[response.session_id] = _Upload(of.run_id, of.message_id, set(response.objects_to_push))
        while len(node.uploads) > HELD:
            _, oldest = node.uploads.popitem(last=False)
            if all(upload.answer != oldest.answer for upload in node.uploads.values()):
                state._on_push_session_expired({oldest.answer})
                state.object_store.delete(oldest.answer)

    def push(self, node: _Node, request: Any, state: Any) -> None:
        """Refuse an object that was not announced, and more bytes than a node's answers may have until they are taken."""
        upload = node.uploads.get(request.session_id)
        if upload is None or upload.run != request.run_id or request.object_id not in upload.pending:
            raise RefusedCall("it pushes an object that it has not announced")
        for session, other in list(node.uploads.items()):
            if other is not upload and other.answer not in state.object_store:
                del node.uploads[session]
        size = sum(other.size for other in node.uploads.values()) + len(request.object_content)
        if size > HELD_BYTES:
            raise RefusedCall(f"its answers have more than {HELD_BYTES >> 20} MB")

    def pushed(self, node: _Node, request: Any, state: Any, response: Any) -> None:
        """Note an object that was stored."""
        upload = node.uploads.get(request.session_id)
        if response.stored and upload is not None and request.object_id in upload.pending:
            upload.pending.remove(request.object_id)
            upload.size += len(request.object_content)


def _ids(tree: Any) -> Iterator[str]:
    """Yield the ids of a tree of objects."""
    waiting = [tree]
    while waiting:
        found = waiting.pop()
        yield str(found.object_id)
        waiting.extend(found.children)


def bind(handlers: Any, rules: FleetRules, name: Callable[[int], str] = str) -> None:
    """Put the rules around Flower's handlers of a site's calls.

    Args:
        handlers: Flower's module of the handlers.
        rules: The rules of all nodes.
        name: A function that returns what a node is called in the log.

    Raises:
        NanofedError: This Flower is another one than was made for.
    """

    def guard(
        call: str,
        before: Callable[[_Node, Any, Any], None] = lambda node, request, state: None,
        after: Callable[[_Node, Any, Any, Any], None] = lambda node, request, state, response: None,
        caller: Callable[[Any], object] = lambda request: request.node.node_id,
    ) -> None:
        flowers = getattr(handlers, call, None)
        if not callable(flowers):
            raise NanofedError(
                f"this version of Flower answers sites in another way: {handlers.__name__} has no {call}"
            )

        @functools.wraps(flowers)
        def handler(*, request: Any, state: Any, **others: Any) -> Any:
            number = caller(request)
            node = rules.of(number)
            with node.lock:
                try:
                    if node.calls.take() is None:
                        detail = f"it makes more than {CALLS:.0f} calls a second"
                        raise RefusedCall(detail, HTTPStatus.SERVICE_UNAVAILABLE)
                    before(node, request, state)
                except RefusedCall as refused:
                    if node.lines.due((call, refused.detail)):
                        who = name(number) if isinstance(number, int) else "one that has no node yet"
                        logger.warning("%s of %s is refused: %s", call, plain(who, SHORT), plain(refused.detail))
                    raise
            response = flowers(request=request, state=state, **others)
            with node.lock:
                after(node, request, state, response)
            return response

        setattr(handlers, call, handler)

    guard("activate_node", rules.heartbeat, caller=lambda request: request.public_key)
    guard("deactivate_node", caller=lambda request: request.node_id)
    guard("send_node_heartbeat", rules.heartbeat)
    guard("pull_messages", after=rules.sent)
    guard("push_messages", rules.answer, rules.announced)
    guard("get_run", rules.run)
    guard("get_fab", rules.bundle)
    guard("push_object", rules.push, rules.pushed)
    guard("pull_object", rules.fetch)
    guard("confirm_message_received", rules.confirm)
