"""A bar of merged tokens on a terminal."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from nanofed import streams


class RoundBar:
    """Shows tokens on their way to the horizon, the time left at this speed, and what the round is doing."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def open(self, tokens: int, horizon: int) -> None:
        """Show the bar, if this is a terminal."""
        self._bar = tqdm(
            total=horizon,
            initial=tokens,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not streams.on_terminal(),
            leave=False,
        )

    def show(self, text: str, tokens: int) -> None:
        """Say what goes on, and move the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(tokens - self._bar.n)
            self._bar.refresh()

    def clear(self) -> None:
        """Make room for a line of the log."""
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
