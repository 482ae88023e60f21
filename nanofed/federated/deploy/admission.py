"""Who may come in, how often, and what became of it: caps, rates and counters by address and site."""

from __future__ import annotations

import ipaddress
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanofed.files import write_atomically

logger = logging.getLogger(__name__)

ADDRESSES = 4096  # whose rates are remembered at a time
NAMED = 256  # addresses whose refusals are listed: those refused last
FORGET_SECONDS = 600.0
KNOWN_SECONDS = 30 * 86400.0  # for which an address from which a site has called is known, through restarts
SITE_ADDRESSES = 16  # of a site that are known: those from which it has called last
NOTE_SECONDS = 3600.0  # between two notes of when a known address has called
LOG_SECONDS = 60.0  # between two lines about the same address and reason


@dataclass(frozen=True)
class Limits:
    """How much a perimeter lets in, how fast, and how long it waits.

    Attributes:
        body: The largest body in bytes that holds a piece of weights or an object of Flower's.
        small_body: The largest of any other body in bytes.
        head: The largest request head in bytes.
        connections: The connections at a time; half of them are for addresses of known sites only. Where they are used
            up, or those of an address, the oldest one on which nothing was asked for yet ends for a new one.
        address_connections: The connections of one address at a time.
        site_bytes: The bytes of one site's bodies that may be under way at a time; a piece of weights has 16 MB.
        handshakes: The TLS handshakes that one address may begin in a second, on average.
        handshake_burst: The TLS handshakes that one address may begin at once.
        requests: The requests that one address may make in a second, on average; those that come up to a second early
            wait, others are refused.
        request_burst: The requests that one address may make at once.
        handshake_seconds: The seconds that a TLS handshake may take.
        head_seconds: The seconds that a head may take, from the connection's start or the head's first byte to its end.
        idle_seconds: The seconds that a connection may rest between two requests.
        bytes_per_second: The slowest a body may come or be taken, on average, after `head_seconds`.
    """

    body: int = 32 << 20
    small_body: int = 4 << 20
    head: int = 16 << 10
    connections: int = 256
    address_connections: int = 64
    site_bytes: int = 256 << 20
    handshakes: float = 20.0
    handshake_burst: int = 100
    requests: float = 500.0
    request_burst: int = 1000
    handshake_seconds: float = 10.0
    head_seconds: float = 10.0
    idle_seconds: float = 75.0
    bytes_per_second: int = 16 << 10

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


@dataclass
class Visitor:
    """An address: an IPv4 address, or the /64 of an IPv6 one, which is what one host gets."""

    name: str
    handshakes: Bucket
    requests: Bucket
    connections: int = 0
    seen: float = field(default_factory=time.monotonic)


class Admission:
    """Caps and rates by address, and counters.

    Args:
        limits: The caps and rates.
        known: The file that keeps the addresses of sites, so that strangers cannot lock a site out after a restart; None keeps
            them in memory only.
    """

    def __init__(self, limits: Limits, known: Path | None = None) -> None:
        self._limits = limits
        self._file = known
        self._known = _read_known(known)
        self._noted: dict[str, dict[str, float]] = {}
        self._silent: dict[Hashable, tuple[Visitor, Callable[[], object]]] = {}  # in the order in which they came
        self._visitors: dict[str, Visitor] = {}
        self._logged: dict[tuple[str, str], tuple[float, int]] = {}
        self._swept = time.monotonic()
        self._began = time.time()
        self.connections = 0
        self.passed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.refused_by_address: dict[str, Counter[str]] = {}
        self.sites: dict[str, dict[str, float]] = {}

    def enter(self, address: str) -> Visitor | None:
        """Let a connection in; None where it is refused."""
        visitor = self._visitor(address)
        limits, known = self._limits, self._is_known(visitor.name)
        full = self.connections >= (limits.connections if known else limits.connections // 2)
        if visitor.handshakes.take() is None:
            self.refuse("handshake_rate", visitor)
        elif visitor.connections >= limits.address_connections and not self._end_silent(visitor):
            self.refuse("address_connections", visitor)
        elif full and not self._end_silent():
            self.refuse("connections", visitor)
        else:
            self.connections += 1
            visitor.connections += 1
            return visitor
        return None

    def leave(self, visitor: Visitor) -> None:
        """Note that a connection has ended."""
        self.connections -= 1
        visitor.connections -= 1
        visitor.seen = time.monotonic()

    def watch(self, connection: Hashable, visitor: Visitor, end: Callable[[], object]) -> None:
        """Note a connection on which nothing was asked for yet: `end` may be called for it, when another needs its place."""
        self._silent[connection] = visitor, end

    def forget(self, connection: Hashable) -> None:
        """Note that a connection is silent no more."""
        self._silent.pop(connection, None)

    def _end_silent(self, visitor: Visitor | None = None) -> bool:
        """End the oldest silent connection, of an address or of all; returns whether there was one."""
        oldest = next((key for key, (of, _) in self._silent.items() if visitor in (None, of)), None)
        if oldest is None:
            return False
        of, end = self._silent.pop(oldest)
        self.refuse("silent", of, "another connection needed its place")
        end()
        return True

    def know(self, visitor: Visitor, site: str) -> None:
        """Note that a site calls from an address."""
        addresses = self._known.setdefault(site, {})
        addresses.pop(visitor.name, None)
        addresses[visitor.name] = time.time()
        if len(addresses) > SITE_ADDRESSES:
            del addresses[next(iter(addresses))]

    def forget_site(self, site: str) -> None:
        """Note that a site is none any more: its addresses are a stranger's."""
        self._known.pop(site, None)

    def _is_known(self, address: str) -> bool:
        when = max((addresses.get(address, 0.0) for addresses in self._known.values()), default=0.0)
        return time.time() - when < KNOWN_SECONDS

    def keep_known(self) -> None:
        """Write the addresses of sites to their file where there is something new to say.

        Raises:
            OSError: it cannot be written; it is tried again.
        """
        rounded = {s: {a: when // NOTE_SECONDS for a, when in sorted(of.items())} for s, of in self._known.items()}
        if self._file is not None and rounded != self._noted:
            write_atomically(self._file, json.dumps(self._known), mode=0o600)
            self._noted = rounded

    def refuse(self, reason: str, visitor: Visitor, detail: str = "") -> None:
        """Count a refusal, and say it in the log where it is not just the same again."""
        self.refused[reason] += 1
        counter = self.refused_by_address.pop(visitor.name, Counter())
        counter[reason] += 1
        self.refused_by_address[visitor.name] = counter  # last, since a dictionary keeps its order
        if len(self.refused_by_address) > NAMED:
            del self.refused_by_address[next(iter(self.refused_by_address))]
        key, now = (visitor.name, reason), time.monotonic()
        last, times = self._logged.get(key, (0.0, 0))
        if times and now - last < LOG_SECONDS:
            self._logged[key] = (last, times + 1)
        elif times or len(self._logged) < ADDRESSES:
            again = f" ({times} times since)" if times > 1 else ""
            logger.warning("refused %s: %s%s%s", visitor.name, reason, f": {detail}" if detail else "", again)
            self._logged[key] = (now, 1)

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
        self._sweep()
        return {
            "began": round(self._began, 3),
            "connections": self.connections,
            "passed": dict(self.passed),
            "refused": dict(self.refused),
            "refused_by_address": {name: dict(counter) for name, counter in self.refused_by_address.items()},
            "sites": self.sites,
        }

    def _visitor(self, address: str) -> Visitor:
        name = _host(address)
        if name not in self._visitors:
            limits = self._limits
            self._visitors[name] = Visitor(
                name,
                Bucket(limits.handshakes, limits.handshake_burst),
                Bucket(limits.requests, limits.request_burst),
            )
            if len(self._visitors) > ADDRESSES:
                self._sweep(at_once=True)
        visitor = self._visitors[name]
        visitor.seen = time.monotonic()
        return visitor

    def _sweep(self, *, at_once: bool = False) -> None:
        """Forget who has not come for long, so that a process of weeks does not grow."""
        now = time.monotonic()
        if now - self._swept < (1.0 if at_once else LOG_SECONDS):
            return
        self._swept = now
        limits = self._limits
        full = max(limits.handshake_burst / limits.handshakes, limits.request_burst / limits.requests)
        quiet = min(FORGET_SECONDS, full) if at_once else FORGET_SECONDS  # by then its buckets are full again anyway
        self._visitors = {n: v for n, v in self._visitors.items() if v.connections or now - v.seen < quiet}
        self._logged = {key: note for key, note in self._logged.items() if now - note[0] < FORGET_SECONDS}


def _read_known(file: Path | None) -> dict[str, dict[str, float]]:
    """Return each site's addresses and when it called from them last; nothing where the file is missing or damaged."""
    try:
        known = json.loads(file.read_bytes()) if file is not None else {}
        now = time.time()
        return {str(site): {str(a): min(float(when), now) for a, when in of.items()} for site, of in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _host(address: str) -> str:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
