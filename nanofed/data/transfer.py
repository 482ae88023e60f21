"""One file over HTTP: resumed, retried, and checked before it gets its name."""

from __future__ import annotations

import email.utils
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import requests
from requests.auth import AuthBase

from nanofed.errors import DataError
from nanofed.files import sha256

logger = logging.getLogger(__name__)

TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two pieces of the answer
MAX_BYTES = 8 << 30  # of a file whose length the server does not tell
_CHUNK = 1 << 14  # what a broken connection may lose
_RETRIED = frozenset({408, 425, 429})  # and every 5xx; the other 4xx are final
_IMPOSSIBLE = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
    requests.exceptions.TooManyRedirects,
)


class Bearer(AuthBase):
    """Sends a token to the address that was asked for; requests drops it on a redirect to another host."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the header."""
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


@dataclass(frozen=True)
class Retry:
    """How often a file is tried again without getting further, and the seconds that the first wait takes."""

    attempts: int = 6
    backoff: float = 1.0
    longest: float = 300.0

    def wait(self, failures: int, asked: float | None) -> float:
        """Return the seconds to wait: exponential with jitter, or what the server asked for."""
        if asked is not None:
            return min(max(asked, 0.0), self.longest)
        return min(self.backoff * 2.0 ** (failures - 1), self.longest) * random.uniform(0.5, 1.5)


class StoppedError(Exception):
    """The transfer was told to stop; what it has stays for the next one."""


class _AgainError(Exception):
    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class _Note:
    """What is known of a partial file, kept beside it: a later part must be of the very same content."""

    url: str
    etag: str | None
    total: int | None
    sha256: str | None


@dataclass
class Transfer:
    """Fetches one address into one file.

    The bytes go to `<target>.part`, with `<target>.part.json` beside it; only a file that has the length and the hash
    that the server announced and passes `check` gets the name `target`. A whole file that has it already is kept
    beside it as `<target>.replaced`.

    Args:
        url: the address.
        target: the file.
        check: returns what is wrong with the finished file, None if nothing is.
        advance: is called with the number of bytes that came, negative for bytes that were thrown away.
        stop: ends the transfer early when it is set.
        retry: how often and when to try again.
        auth: is sent with the first request.
    """

    url: str
    target: Path
    check: Callable[[Path], str | None]
    advance: Callable[[int], object]
    stop: threading.Event
    retry: Retry
    auth: AuthBase | None = None

    def __post_init__(self) -> None:
        """Name the partial file and the note about it."""
        self._part = self.target.with_name(f"{self.target.name}.part")
        self._note_path = self.target.with_name(f"{self.target.name}.part.json")
        self._counted = 0

    def run(self) -> None:
        """Fetch the file.

        Raises:
            DataError: the server refuses it, or it came to nothing however often it was tried.
            StoppedError: `stop` was set.
        """
        failures, furthest = 0, self._size()
        while True:
            try:
                with requests.Session() as session:
                    self._attempt(session)
                self._finish()
                return
            except (_AgainError, requests.RequestException) as error:
                if isinstance(error, _IMPOSSIBLE):
                    raise DataError(f"{self.url} cannot be asked for: it is, or leads to, no usable address") from error
                failures = 1 if self._size() > furthest else failures + 1
                furthest = max(furthest, self._size())
                if failures > self.retry.attempts:
                    raise DataError(
                        f"{self.url}: {reason(error)}; gave up after {failures} attempts "
                        "(the same command goes on where this one stopped)"
                    ) from error
                wait = self.retry.wait(failures, getattr(error, "wait", None))
                logger.info("%s: %s; again in %.1f s", self.target.name, reason(error), wait)
                if self.stop.wait(wait):
                    raise StoppedError from error
            except OSError as error:
                raise DataError(f"{self._part} cannot be written: {error.strerror or error}") from error

    def _attempt(self, session: requests.Session) -> None:
        note = self._note()
        if note is None:
            self._discard()
        offset = self._size()
        self._count(offset)
        if note is not None and offset and offset == note.total:
            return  # all there: an earlier run ended before it was checked
        headers = {"Accept-Encoding": "identity"}
        if note is not None and offset:
            headers["Range"] = f"bytes={offset}-"
            if note.etag and not note.etag.startswith("W/"):
                headers["If-Range"] = note.etag
        with session.get(self.url, headers=headers, auth=self.auth, stream=True, timeout=TIMEOUT) as answer:
            refuse_status(answer)
            if note is not None and offset and answer.status_code == 206 and _continues(answer, note, offset):
                total = note.total
            elif answer.status_code == 200:
                note = _described(self.url, answer)
                total = note.total
                self._discard()
                self._note_path.write_text(json.dumps(asdict(note)), encoding="utf-8")
            else:
                self._discard()
                raise _AgainError(f"answered {answer.status_code} with another part than was asked for")
            self._receive(answer)
        if total is not None and self._size() != total:
            raise _AgainError(f"sent {self._size():,} of {total:,} bytes")

    def _receive(self, answer: requests.Response) -> None:
        with self._part.open("ab", buffering=0) as file:
            for chunk in answer.iter_content(_CHUNK):
                file.write(chunk)
                self._count(file.tell())
                if file.tell() > MAX_BYTES:
                    raise DataError(f"{self.url} does not end: {file.tell():,} bytes came without a length")
                if self.stop.is_set():
                    raise StoppedError

    def _finish(self) -> None:
        note = self._note()
        problem = self.check(self._part)
        if problem is None and note is not None and note.sha256 and sha256(self._part) != note.sha256:
            problem = "its sha256 is not the one that the server announced"
        if problem is not None:
            self._discard()
            raise _AgainError(f"what came is not the file: {problem}")
        if self.target.exists() and self.check(self.target) is None:  # whole and another's: it may be somebody's own
            self.target.replace(self.target.with_name(f"{self.target.name}.replaced"))
        self._part.replace(self.target)
        self._note_path.unlink(missing_ok=True)

    def _note(self) -> _Note | None:
        try:
            note = _Note(**json.loads(self._note_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return note if note.url == self.url and isinstance(note.etag, (str, type(None))) else None

    def _size(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _count(self, size: int) -> None:
        self.advance(size - self._counted)
        self._counted = size

    def _discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._note_path.unlink(missing_ok=True)
        self._count(0)


def _continues(answer: requests.Response, note: _Note, offset: int) -> bool:
    """Tell whether a 206 goes on where the partial file ends, and within the same content."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
    if match is None:
        return False
    first, _, total = map(int, match.groups())
    etag = answer.headers.get("ETag")
    return first == offset and note.total in (None, total) and (None in (etag, note.etag) or etag == note.etag)


def _described(url: str, answer: requests.Response) -> _Note:
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise _AgainError("sent it compressed, though asked not to")
    total, linked = length(answer), None
    for hop in answer.history:  # the hub tells the hash of the content where it redirects to its storage
        etag = hop.headers.get("X-Linked-ETag", "").strip('"')
        linked = etag if re.fullmatch(r"[0-9a-f]{64}", etag) else linked
        size = hop.headers.get("X-Linked-Size", "")
        if size.isdecimal() and total is not None and int(size) != total:
            raise _AgainError(f"announced {int(size):,} bytes and then {total:,}")
    return _Note(url, answer.headers.get("ETag"), total, linked)


def length(answer: requests.Response) -> int | None:
    """Return the length that an answer announces for the whole file, None if it does not."""
    value = answer.headers.get("Content-Length", "")
    return int(value) if value.isdecimal() else None


def refuse_status(answer: requests.Response) -> None:
    """Raise on an answer that is not the file: to try again, or for good."""
    status = answer.status_code
    if status in _RETRIED or status >= 500:
        raise _AgainError(f"answered {status}", _retry_after(answer))
    if status in (401, 403):
        raise DataError(f"{answer.url} refuses access ({status}); set HF_TOKEN if it needs one")
    if status >= 400 and status != 416:
        raise DataError(f"{answer.url} answered {status}: the file is not there")


def _retry_after(answer: requests.Response) -> float | None:
    value = answer.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError):
        return None


def reason(error: Exception) -> str:
    """Say in a few words why a request failed; the libraries' own texts are whole paragraphs."""
    if isinstance(error, _AgainError):
        return str(error)
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy cannot be reached or refuses"
    if isinstance(error, requests.exceptions.SSLError):
        return "the TLS handshake failed"
    if isinstance(error, requests.Timeout):
        return "timed out"
    match = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
    return match[1] if match else "the connection broke"
