"""A bad link between a site and its server: it stalls without a word, is slow, or breaks in the middle of an upload."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

HOST = "127.0.0.1"
PIECE = 8 << 10
STALLED, CUT = "stalled", "cut"


class Link:
    """A relay on loopback, at its own port, that passes bytes on to the port `upstream` as its state says."""

    def __init__(self, upstream: int) -> None:
        self.bytes_per_second: float | None = None  # each way, over all connections; None for as fast as it goes
        self.state = ""  # while bytes pass; `stalled` holds them back, connections stay open; `cut` was done once
        self.sent = 0  # bytes that have gone up
        self._upstream = upstream
        self._next: tuple[int, str] | None = None  # bytes up at which the state changes, and to what
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._lanes = {True: threading.Lock(), False: threading.Lock()}
        self._flows = threading.Event()
        self._flows.set()
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self, after: int = 0) -> None:
        """Hold everything back, both ways, once so many more bytes have gone up."""
        self._arm(after, STALLED)

    def cut(self, after: int = 0) -> None:
        """Reset all connections once so many more bytes have gone up; new ones work."""
        self._arm(after, CUT)

    def heal(self) -> None:
        """Let bytes pass again, at once and at full speed."""
        with self._lock:
            self._next, self.state, self.bytes_per_second = None, "", None
            self._flows.set()

    def close(self) -> None:
        """End it."""
        self.heal()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._reset()

    def _arm(self, after: int, state: str) -> None:
        with self._lock:
            self._next = (self.sent + after, state)
        self._count(0)

    def _count(self, up: int) -> None:
        with self._lock:
            self.sent += up
            if self._next is None or self.sent < self._next[0]:
                return
            self.state, self._next = self._next[1], None
            if self.state == STALLED:
                self._flows.clear()
        if self.state == CUT:
            self._reset()

    def _reset(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                site, _ = self._listener.accept()
                try:
                    server = socket.create_connection((HOST, self._upstream), timeout=10)
                    server.settimeout(None)
                except OSError:  # there is no server now
                    site.close()
                    continue
                threading.Thread(target=self._serve, args=(site, server), daemon=True).start()

    def _serve(self, site: socket.socket, server: socket.socket) -> None:
        pair = (site, server)
        with self._lock:
            self._pairs.append(pair)
        down = threading.Thread(target=self._pump, args=(server, site, False), daemon=True)
        with site, server:
            down.start()
            self._pump(site, server, up=True)
            down.join()
        with self._lock, contextlib.suppress(ValueError):
            self._pairs.remove(pair)

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                if up:
                    self._count(len(data))
                self._flows.wait()
                if rate := self.bytes_per_second:
                    with self._lanes[up]:
                        time.sleep(len(data) / rate)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
