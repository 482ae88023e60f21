"""A bad link between a site and its server: it stalls without a word, is slow or far, or breaks in the middle of an upload.

python -m tests.faults.link PORT SERVER DELAY is one from PORT on loopback to PORT of a server, of so many seconds each way.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time

HOST = "127.0.0.1"
PIECE = 8 << 10
FAR_PIECE, FAR_PIECES = 256 << 10, 256  # of a far link, and how many are under way at most, each way of a connection
STALLED, CUT = "stalled", "cut"


class Link:
    """A relay on loopback, at its own port, that passes bytes on to the port `upstream` as its state says.

    Each byte arrives `delay` seconds after it was sent. TCP knows nothing of it: its windows grow as they do on loopback.
    """

    def __init__(self, upstream: int, server: str = HOST, port: int = 0, delay: float = 0.0) -> None:
        self.bytes_per_second: float | None = None  # each way, over all connections; None for as fast as it goes
        self.state = ""  # while bytes pass; `stalled` holds them back, connections stay open; `cut` was done once
        self.sent = 0  # bytes that have gone up
        self._upstream = (server, upstream)
        self._delay = delay
        self._next: tuple[int, str] | None = None  # bytes up at which the state changes, and to what
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._lanes = {True: threading.Lock(), False: threading.Lock()}
        self._flows = threading.Event()
        self._flows.set()
        self._listener = socket.create_server((HOST, port))
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
                    server = socket.create_connection(self._upstream, timeout=10)
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
        late = _Late(sink, self._delay) if self._delay else None
        send = late.send if late else sink.sendall
        with contextlib.suppress(OSError):
            while data := source.recv(FAR_PIECE if late else PIECE):
                if up:
                    self._count(len(data))
                self._flows.wait()
                if rate := self.bytes_per_second:
                    with self._lanes[up]:
                        time.sleep(len(data) / rate)
                send(data)
        if late:
            late.finish()
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class _Late:
    """Sends to a socket what it is given, in its order, each part `delay` seconds later."""

    def __init__(self, sink: socket.socket, delay: float) -> None:
        self._sink = sink
        self._delay = delay
        self._parts: queue.Queue[tuple[float, bytes]] = queue.Queue(FAR_PIECES)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, data: bytes) -> None:
        """Take some bytes; wait while as many are under way as a line holds."""
        self._parts.put((time.monotonic() + self._delay, data))

    def finish(self) -> None:
        """Wait until all is sent."""
        self.send(b"")
        self._thread.join()

    def _run(self) -> None:
        broken = False
        while (part := self._parts.get())[1]:
            time.sleep(max(0.0, part[0] - time.monotonic()))
            try:
                if not broken:
                    self._sink.sendall(part[1])
            except OSError:
                broken = True


if __name__ == "__main__":
    Link(int(sys.argv[1]), sys.argv[2], int(sys.argv[1]), float(sys.argv[3]))
    threading.Event().wait()
