"""One connection of a site to its server, for calls of many bytes: slow lines are let be, silent ones are given up."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from nanofed.federated.site.channel import ChannelError

SILENCE_SECONDS = 30.0  # without a byte, after which a connection is given up
# Likewise, once all is sent: some of it waits in buffers on its way, and the server takes its time.
ANSWER_SECONDS = 90.0
BLOCK_BYTES = 64 << 10  # Python counts a time limit for all of what is sent at once


class Lane:
    """One connection, made anew after every failure."""

    def __init__(self, address: tuple[str, int], authority: Path | None) -> None:
        self._connection: http.client.HTTPConnection
        if authority is None:
            self._connection = http.client.HTTPConnection(*address, timeout=SILENCE_SECONDS)
            return
        context = ssl.create_default_context(cafile=str(authority))
        proxy = _proxy(*address)
        first = address if proxy is None else (proxy.hostname or "", proxy.port or 80)
        self._connection = http.client.HTTPSConnection(*first, timeout=SILENCE_SECONDS, context=context)
        if proxy is not None:
            self._connection.set_tunnel(*address, headers=_credentials(proxy))

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def asked(
        self, path: str, headers: dict[str, str], body: list[memoryview], end: float
    ) -> Iterator[http.client.HTTPResponse]:
        """Make a call and yield its answer, until `end` on the monotonic clock; the connection is kept where all goes well."""
        length = sum(map(len, body))
        try:
            self._connection.request("POST", path, _blocks(body, end), {**headers, "Content-Length": str(length)})
            line: socket.socket = self._connection.sock
            line.settimeout(min(ANSWER_SECONDS, max(1.0, end - time.monotonic())))
            answer = self._connection.getresponse()
            line.settimeout(SILENCE_SECONDS)
            yield answer
            answer.read()
        except BaseException:
            self._connection.close()
            raise


def check_time(end: float) -> None:
    """Raise TimeoutError once `end`, on the monotonic clock, is over."""
    if time.monotonic() > end:
        raise TimeoutError("the round is over")


def _blocks(views: Sequence[memoryview], end: float) -> Iterator[memoryview]:
    for view in views:
        for start in range(0, len(view), BLOCK_BYTES):
            check_time(end)
            yield view[start : start + BLOCK_BYTES]


def _proxy(host: str, port: int) -> SplitResult | None:
    """Return the proxy through which this machine reaches a server, None for none: the one that Flower's own calls take.

    Raises:
        ChannelError: Python's own HTTP client cannot reach it so.
    """
    found = getproxies()
    url = found.get("https") or found.get("all")
    around = "*" in found.get("no", "").replace(" ", "").split(",")
    if not url or around or proxy_bypass(host) or proxy_bypass(f"{host}:{port}"):
        return None
    proxy = urlsplit(url if "://" in url else f"http://{url}")
    if proxy.scheme != "http" or ":" in host:
        way = f"this machine's is {proxy.scheme}://, to {host}"
        raise ChannelError(f"weights can pass a proxy at http://HOST:PORT to a server that is no IPv6 address: {way}")
    return proxy


def _credentials(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    words = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(words.encode()).decode('ascii')}"}
