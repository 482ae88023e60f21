"""Request bodies, handed to Flower's web applications whole.

A SuperLink and a SuperNode pass each request through several layers of Starlette's middleware, which start a group of tasks for
every piece of a body: 64 KB of many megabytes. Put together before the first layer, the pieces cost that once a message.
Flower's own layers put the body together too, so no more of it is held than before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from nanofed.errors import NanofedError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class WholeBodies:
    """ASGI middleware: an application behind it receives each request's body in one piece."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = await receive()
        pieces = [message.get("body", b"")]
        while message.get("more_body", False):
            message = await receive()
            pieces.append(message.get("body", b""))
        waiting = [message]  # where the client has gone meanwhile, that is what the application hears
        if message["type"] == "http.request":
            waiting = [{"type": "http.request", "body": b"".join(pieces), "more_body": False}]

        async def receive_whole() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, receive_whole, send)


def receive_whole_bodies(main: Any) -> None:
    """Let one of Flower's web applications receive whole bodies.

    Args:
        main: Flower's module that creates the application.

    Raises:
        NanofedError: this Flower is another one than was made for.
    """
    create = getattr(main, "create_app", None)
    if not callable(create):
        raise NanofedError(f"this version of Flower creates its application in another way: {main.__name__} does not")

    def create_app(*args: Any, **kwargs: Any) -> Any:
        app = create(*args, **kwargs)
        app.add_middleware(WholeBodies)  # the last added is the outermost
        return app

    main.create_app = create_app
