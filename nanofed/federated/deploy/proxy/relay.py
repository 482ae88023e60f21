"""A client's connection: requests are read, checked, passed to the SuperLink, and its answers passed back."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection
from http import HTTPStatus

from nanofed.federated.deploy.proxy.guard import Guard, Limits, Visitor
from nanofed.federated.deploy.proxy.http import BadAnswer, Refused, Request, parse, parse_answer, refusal
from nanofed.federated.deploy.proxy.sites import Sites
from nanofed.federated.deploy.proxy.stream import Closed, HeadTooLarge, Stream

KEEP_SECONDS = 3.0  # the SuperLink's uvicorn ends an idle connection after 5
CONNECT_SECONDS = 10.0
PATIENCE = 1.0  # seconds that a request over the rate may wait
LINGER_SECONDS = (
    1.0  # to read on after a refusal: closed with bytes unread, the connection would be reset, the answer lost
)


class Upstream:
    """Connections to the SuperLink, used again while they are fresh.

    Args:
        host: name or address.
        port: of it.
        context: TLS, None without.
    """

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None) -> None:
        self._host, self._port = host, port
        self.context = context
        self._idle: list[tuple[float, Stream]] = []
        self.name = f"{host}:{port}".encode()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Stream]:
        """Lend a connection; it is kept where the block ends well, and ended otherwise.

        Raises:
            OSError: the SuperLink does not answer.
        """
        stream = self._fresh() or await self._connect()
        try:
            yield stream
        except BaseException:
            stream.abort()
            raise
        self._idle.append((time.monotonic(), stream))

    def sweep(self) -> None:
        """End connections that have been idle for long."""
        while self._idle and time.monotonic() - self._idle[0][0] > KEEP_SECONDS:
            self._idle.pop(0)[1].close()

    def close(self) -> None:
        """End all idle connections."""
        while self._idle:
            self._idle.pop()[1].abort()

    def _fresh(self) -> Stream | None:
        self.sweep()
        while self._idle:
            _, stream = self._idle.pop()
            if not stream.gone and not stream.pending:
                return stream
            stream.abort()
        return None

    async def _connect(self) -> Stream:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_SECONDS):
            _, stream = await loop.create_connection(Stream, self._host, self._port, ssl=self.context)
        return stream


class Relay:
    """What happens on each connection.

    Args:
        guard: counts, and knows the addresses.
        sites: knows the keys.
        upstream: the SuperLink.
        limits: in seconds and bytes.
    """

    def __init__(self, guard: Guard, sites: Sites, upstream: Upstream, limits: Limits) -> None:
        self._guard, self._sites, self._upstream, self._limits = guard, sites, upstream, limits
        self._waiting: set[Stream] = set()
        self._callers: dict[Stream, str] = {}
        self._under_way: Counter[str] = Counter()  # bytes of bodies, by site
        self._ending = False

    async def serve(self, client: Stream, visitor: Visitor) -> None:
        """Answer a client's requests, one after another, until one of both sides ends."""
        served = False
        try:
            while await self._arrived(client, served) and await self._exchange(client, visitor):
                served = True
        except TimeoutError:
            if not served:
                self._guard.refuse("silent", visitor)
        except Refused as refused:
            self._guard.refuse(refused.reason, visitor, refused.detail)
            await self._say(client, refused)
        except Closed as closed:
            self._guard.refuse(closed.reason, visitor)
        finally:
            self._callers.pop(client, None)
            client.close()

    def cut(self, sites: Collection[str]) -> None:
        """End the connections of sites whose key is no longer good, whatever is under way on them."""
        for site in sites:
            self._guard.forget_site(site)
        for client, site in self._callers.items():
            if site in sites:
                client.abort()

    def end(self) -> None:
        """Let the requests under way be the last, and end the connections that wait for one."""
        self._ending = True
        for client in self._waiting:
            client.close()

    async def _arrived(self, client: Stream, served: bool) -> bool:
        self._waiting.add(client)
        try:
            # Before the first request nobody may linger.
            async with asyncio.timeout(self._limits.idle_seconds if served else self._limits.head_seconds):
                return await client.arrived()
        finally:
            self._waiting.discard(client)

    async def _exchange(self, client: Stream, visitor: Visitor) -> bool:
        """Pass one request and its answer; returns whether another may follow."""
        limits = self._limits
        wait = visitor.requests.take(PATIENCE)
        if wait is None:
            raise Refused(
                "request_rate", HTTPStatus.SERVICE_UNAVAILABLE, "too many requests from this address: slow down"
            )
        await asyncio.sleep(wait)
        request = parse(await self._head(client), limits.body, limits.small_body)
        site = self._sites.identify(request.headers)
        self._callers[client] = site
        self._guard.know(visitor, site)
        self._guard.forget(asyncio.current_task())
        if self._under_way[site] + request.length > limits.site_bytes:
            raise Refused("site_bytes", HTTPStatus.SERVICE_UNAVAILABLE, f"{site} sends too much at a time")
        self._under_way[site] += request.length
        try:
            async with self._upstream.connection() as upstream:
                down = await self._pass(client, upstream, request)
        except (BadAnswer, HeadTooLarge, TimeoutError, OSError) as error:
            if client.gone:
                raise error if isinstance(error, Closed) else Closed("broken_off") from error
            detail = f"the SuperLink behind this proxy does not answer as it should ({type(error).__name__})"
            raise Refused("upstream", HTTPStatus.BAD_GATEWAY, detail) from error
        finally:
            self._under_way[site] -= request.length
        self._guard.count(site, request.path.decode().rpartition("/")[2], request.length, down)
        return not (request.last or self._ending)

    async def _head(self, client: Stream) -> bytes:
        try:
            async with asyncio.timeout(self._limits.head_seconds):
                return await client.head(self._limits.head)
        except TimeoutError:
            raise Refused("slow_head", HTTPStatus.REQUEST_TIMEOUT, "the head takes too long") from None
        except HeadTooLarge:
            detail = f"a head is at most {self._limits.head} bytes"
            raise Refused("head_too_large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail) from None

    async def _pass(self, client: Stream, upstream: Stream, request: Request) -> int:
        """Pass a request and its answer; returns the bytes of the answer's body."""
        limits = self._limits
        parser, head = request.head(self._upstream.name)
        await upstream.write(head)
        try:
            async with asyncio.timeout(limits.body_seconds(request.length)):
                await _pump(client, upstream, request.length)
        except TimeoutError:
            if upstream.stalled:
                raise
            raise Refused("slow_body", HTTPStatus.REQUEST_TIMEOUT, "the body takes too long") from None
        if client.pending:
            raise Refused("pipelined", HTTPStatus.BAD_REQUEST, "a request before the answer to the one before")
        async with asyncio.timeout(limits.answer_seconds):
            while (answer := parse_answer(parser, await upstream.head(limits.head))) is None:
                pass
        try:
            async with asyncio.timeout(limits.body_seconds(answer.length)):
                await client.write(answer.head(close=request.last))
                await _pump(upstream, client, answer.length)
        except (Closed, TimeoutError) as error:
            reason = "broken_off" if client.gone else "slow_reader" if client.stalled else "upstream"
            client.abort()  # the answer has begun: nothing else can be said
            raise Closed(reason) from error
        if answer.last or upstream.pending:
            upstream.abort()
        return answer.length

    async def _say(self, client: Stream, refused: Refused) -> None:
        with contextlib.suppress(Closed, OSError, TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await client.write(refusal(refused))
                while True:
                    await client.part(1 << 20)


async def _pump(source: Stream, sink: Stream, length: int) -> None:
    """Pass `length` bytes on, as they come and as they are taken."""
    while length:
        part = await source.part(length)
        length -= len(part)
        await sink.write(part)
