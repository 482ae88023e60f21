"""Request bodies reach Flower's web applications whole."""

from __future__ import annotations

import asyncio
from types import ModuleType
from typing import Any

import pytest
from flwr.superlink import main as superlink
from flwr.supernode import main as supernode

from nanofed.errors import NanofedError
from nanofed.federated.whole_bodies import Message, WholeBodies, receive_whole_bodies


def heard(messages: list[Message], kind: str = "http") -> list[Message]:
    """Return what an application behind the middleware receives of some messages."""
    waiting = list(messages)
    received: list[Message] = []

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError("nothing is sent")

    async def app(scope: Message, receive: Any, send: Any) -> None:
        for _ in range(2):
            received.append(await receive())
            if not waiting:
                return

    asyncio.run(WholeBodies(app)({"type": kind}, receive, send))
    return received


def piece(body: bytes, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def test_pieces_become_one_body_and_then_the_rest_follows() -> None:
    gone: Message = {"type": "http.disconnect"}
    assert heard([piece(b"ab", True), piece(b"", True), piece(b"c", False), gone]) == [piece(b"abc", False), gone]
    assert heard([piece(b"whole", False), gone]) == [piece(b"whole", False), gone]


def test_an_application_hears_of_a_client_that_goes_in_the_middle() -> None:
    gone: Message = {"type": "http.disconnect"}
    assert heard([piece(b"ab", True), gone]) == [gone]


def test_other_connections_pass_as_they_are() -> None:
    messages = [piece(b"ab", True), piece(b"c", False)]
    assert heard(messages, kind="lifespan") == messages


@pytest.mark.parametrize("main", [superlink, supernode])
def test_flowers_applications_have_it_outermost(main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "create_app", main.create_app)
    receive_whole_bodies(main)
    assert main.create_app().user_middleware[0].cls is WholeBodies


def test_another_flower_is_refused() -> None:
    with pytest.raises(NanofedError, match="another way"):
        receive_whole_bodies(ModuleType("another"))
