"""Words of others, made fit for a log, a terminal and a file: what a site may be called, and any other text cut and printable."""

from __future__ import annotations

import re

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it becomes a folder's and a file's, and is logged
MAX_TEXT = 300


def plain(text: object, limit: int = MAX_TEXT) -> str:
    """Return a text of at most `limit` characters in one line; line ends, escapes and the like are shown as escapes.

    A client's failure, a name or a metric may hold what it likes: control characters that rewrite a terminal, characters
    that turn the direction of writing, lone surrogates that no file takes, megabytes of them.
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)[: limit + 1]
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
