"""How much a perimeter lets in, how fast, and what became of it: limits, rates and counters."""

from __future__ import annotations

import functools
import ipaddress
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

ADDRESSES = 4096  # whose rates are remembered at a time: those that have called last
NAMED = 256  # addresses whose refusals are listed: those refused last
SAID = 4096  # things that a `Throttle` remembers at a time
LOG_SECONDS = 60.0  # between two lines about the same address and reason


@dataclass(frozen=True)
class Limits:
    """How much a perimeter lets in, how fast, and how long it waits."""

    body: int = 32 << 20  # the largest body in bytes that holds a piece of weights or an object of Flower's
    small_body: int = 4 << 20  # the largest of any other body in bytes
    head: int = 16 << 10  # the largest request head in bytes
    # The connections at a time, after their TLS handshakes. Where they are used up, or those of an address, the oldest one on
    # which no site has called yet ends for a new one.
    connections: int = 256
    address_connections: int = 64  # the connections of one address at a time
    # The bytes of one site's bodies that may be under way at a time; a piece of weights has 16 MB.
    site_bytes: int = 256 << 20
    # The requests that one address may make in a second, on average; those that come up to a second early wait, others are
    # refused.
    requests: float = 500.0
    request_burst: int = 1000  # the requests that one address may make at once
    handshake_seconds: float = 10.0  # the seconds that a TLS handshake may take
    # The seconds that a head may take, from the connection's start or the head's first byte to its end.
    head_seconds: float = 10.0
    idle_seconds: float = 75.0  # the seconds that a connection may rest between two requests
    bytes_per_second: int = 16 << 10  # the slowest a body may come or be taken, on average, after `head_seconds`

    def body_seconds(self, length: int) -> float:
        """Return how long a body of a length may take."""
        return self.head_seconds + length / self.bytes_per_second


class Bucket:
    """Tokens that come back at a rate; taking one that is not there yet says how long to wait for it.

    Args:
        rate: The tokens that come back in a second.
        burst: The tokens that there are at first, and at most.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._at = float(burst), time.monotonic()

    def take(self, patience: float = 0.0) -> float | None:
        """Take a token; returns the seconds until it is due, None (and takes none) where these are more than `patience`."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        wait = max(0.0, (1 - self._tokens) / self._rate)
        if wait > patience:
            return None
        self._tokens -= 1
        return wait


class Throttle:
    """Keeps what is said again and again out of a log.

    Args:
        seconds: The seconds between two times at which the same is said.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._said: OrderedDict[Hashable, float] = OrderedDict()

    def due(self, what: Hashable) -> bool:
        """Tell whether something may be said, and note that it is."""
        now = time.monotonic()
        while self._said and now - next(iter(self._said.values())) >= self._seconds:
            self._said.popitem(last=False)
        if what in self._said or len(self._said) >= SAID:
            return False
        self._said[what] = now
        return True


class Admission:
    """The rates of addresses, and counters of what passes and of what is refused.

    Args:
        limits: The rates.
    """

    def __init__(self, limits: Limits) -> None:
        # By address; whose requests were longest ago is forgotten.
        self.requests = functools.lru_cache(ADDRESSES)(lambda address: Bucket(limits.requests, limits.request_burst))
        self._lines = Throttle(LOG_SECONDS)
        self._began = time.time()
        self.passed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.refused_by_address: OrderedDict[str, Counter[str]] = OrderedDict()
        self.sites: dict[str, dict[str, float]] = {}

    def refuse(self, reason: str, address: str, detail: str = "") -> None:
        """Count a refusal, and say it in the log where it is not just the same again."""
        self.refused[reason] += 1
        self.refused_by_address.setdefault(address, Counter())[reason] += 1
        self.refused_by_address.move_to_end(address)
        if len(self.refused_by_address) > NAMED:
            self.refused_by_address.popitem(last=False)
        if self._lines.due((address, reason)):
            logger.warning("refused %s: %s%s", address, reason, f": {detail}" if detail else "")

    def count(self, site: str, call: str, up: int, down: int) -> None:
        """Count a request that was passed and answered, with the bytes of its bodies."""
        self.passed[call] += 1
        figures = self.sites.setdefault(site, {"requests": 0, "bytes_up": 0, "bytes_down": 0, "last": 0.0})
        figures["requests"] += 1
        figures["bytes_up"] += up
        figures["bytes_down"] += down
        figures["last"] = round(time.time(), 3)

    def figures(self) -> dict[str, Any]:
        """Return all counters, since the start."""
        return {
            "began": round(self._began, 3),
            "passed": self.passed,
            "refused": self.refused,
            "refused_by_address": self.refused_by_address,
            "sites": self.sites,
        }


def address_of(peer: str) -> str:
    """Return what counts as one address: an IPv4 address, or the /64 of an IPv6 one, which is what one host gets."""
    ip = ipaddress.ip_address(peer.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
