"""The line at the bottom of a terminal that moves while a command works; the lines of its log scroll above it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from nanofed import runtime

DRAW_SECONDS = 0.2
COLUMNS = 80  # of a terminal that does not say how many it has
ERASE = "\r\x1b[2K"

_lock = threading.RLock()
_is_running = False  # whether a line is drawn again and again
_is_drawn = False  # whether it is on the terminal now
_writers = 0  # how many blocks of `without_line` are under way


def on_terminal() -> bool:
    """Tell whether standard error is a terminal on which a line can move; `TERM=dumb` and `NO_COLOR` say that none may."""
    said = runtime.environment()
    plain = bool(said.get("NO_COLOR")) or said.get("TERM") == "dumb"
    return not plain and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


class StatusLine:
    """Draws a line on standard error where that is a terminal, and nothing elsewhere.

    A thread asks for the line five times a second and writes it where it has changed, so that whoever works neither waits for the
    terminal nor has to call anything. Stopping erases the line and leaves the cursor where it began.

    Args:
        text: it returns the line for so many columns, of which it may fill all; it is called in another thread.
    """

    def __init__(self, text: Callable[[int], str]) -> None:
        self._text = text
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StatusLine:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to draw."""
        global _is_running
        if self._thread is None and on_terminal():
            _is_running = True
            self._thread = threading.Thread(target=self._draw, name="nanofed-line", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Erase the line, and draw no more."""
        global _is_running
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            with _lock:
                _erase()
                _is_running = False

    def _draw(self) -> None:
        global _is_drawn
        drawn = ""
        while not self._stopped.wait(DRAW_SECONDS):
            try:
                columns = (os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS) - 1  # the last one would wrap
                line = self._text(columns)[:columns]
                with _lock:
                    if _writers == 0 and (line != drawn or not _is_drawn):
                        sys.stderr.write(ERASE + line)
                        sys.stderr.flush()
                        drawn, _is_drawn = line, True
            except OSError:  # the terminal has gone
                return


@contextmanager
def without_line() -> Iterator[None]:
    """Take the line away for the block, which writes to the terminal itself; the line is drawn again some time after it."""
    global _writers
    with _lock:
        _writers += 1
        _erase()
    try:
        yield
    finally:
        with _lock:
            _writers -= 1


def _erase() -> None:
    global _is_drawn
    if _is_running:  # also where no line is drawn: the terminal may have written ^C
        sys.stderr.write(ERASE)
        sys.stderr.flush()
        _is_drawn = False


def fitting(parts: Iterable[str], columns: int) -> str:
    """Return as many of the first parts as fit into so many columns, with two spaces between them."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if line and len(longer) > columns:
            break
        line = longer
    return line


def duration(seconds: float) -> str:
    """Return seconds as people say them: `42 s`, `3 min 5 s`, `2 h 14 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
