"""Which site a request comes from: Flower's SuperNode authentication, checked before the body, each signature once."""

from __future__ import annotations

import datetime
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from nanofed.federated.deploy.keys import read_sites

PUBLIC_KEY, TIMESTAMP, SIGNATURE = b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"
# Seconds of age that Flower's node authentication takes (TIMESTAMP_TOLERANCE, SYSTEM_TIME_TOLERANCE).
OLDEST, NEWEST = 305.0, 5.0


class RefusedRequest(Exception):
    """A request is not answered.

    Args:
        reason: The name under which the refusal is counted.
        status: The HTTP status of the answer. Flower's client tries again after 502, 503 and 504, ends its
            SuperNode after 401, and after 403 thinks that the run has ended.
        detail: A sentence for whoever reads the site's log.
    """

    def __init__(self, reason: str, status: int, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.status, self.detail = reason, HTTPStatus(status), detail


class Signatures:
    """The sites whose keys are in a folder, and what each has signed lately.

    Args:
        folder: The folder of the `NAME.pub` files, one for each site.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._used: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()  # when to forget, when signed
        self._floor = time.time()  # what was signed until then may have been used and forgotten, however clocks jump
        self._sites: dict[bytes, str] = {}
        self.read()

    def read(self) -> set[str]:
        """Read the folder again, and return the sites whose key has gone: it is refused from now on."""
        before = self._sites
        self._sites, _ = read_sites(self._folder)  # what is passed over is said by the server's own process
        return {before[pem] for pem in before.keys() - self._sites.keys()}

    def identify(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the name of the site that signed a request.

        The signature covers the time only, so the same time of the same site is a replay, in whatever form it is written: who has
        seen a signature can write it differently (other padding in base64, n - s for s), but cannot sign another time.

        Raises:
            RefusedRequest: no site's key, not its signature, a time that Flower would not take, or one that was used.
        """
        try:
            pem = b64decode(headers[PUBLIC_KEY], validate=True)
            signature = b64decode(headers[SIGNATURE], validate=True)
            timestamp = headers[TIMESTAMP].decode("ascii")
            signed_at = datetime.datetime.fromisoformat(timestamp)
            if signed_at.tzinfo is None:
                raise ValueError("a time without its zone")
            signed = signed_at.timestamp()
        except (KeyError, ValueError, OverflowError) as error:
            raise RefusedRequest("unsigned", 401, "no SuperNode's signature: start it with its key") from error
        if pem not in self._sites:
            raise RefusedRequest("unknown_key", 401, "the operator has not registered this key")
        name = self._sites[pem]
        if not verify_signature(bytes_to_public_key(pem), timestamp.encode(), signature):
            raise RefusedRequest("bad_signature", 401, f"this is not the signature of {name}")
        self._use(name, timestamp, signed)
        return name

    def _use(self, name: str, timestamp: str, signed: float) -> None:
        age, now = time.time() - signed, time.monotonic()
        if not -NEWEST < age < OLDEST:
            raise RefusedRequest(
                "stale_signature",
                401,
                f"{name} signed this {abs(age):.0f} seconds {'ago' if age > 0 else 'ahead'}: set its clock",
            )
        while self._used and next(iter(self._used.values()))[0] < now:
            _, (_, forgotten) = self._used.popitem(last=False)
            self._floor = max(self._floor, forgotten)
        if signed <= self._floor:
            raise RefusedRequest("early_signature", 503, "signed before this server began: sign anew")
        if (name, timestamp) in self._used:
            raise RefusedRequest("replayed_signature", 503, f"{name} has used this signature: sign anew")
        self._used[name, timestamp] = (now + OLDEST + NEWEST, signed)
