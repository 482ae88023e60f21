"""What went wrong in a run, counted by kind and client: in the checkpoint, in TensorBoard, and line by line in a file."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nanofed.federated.wire.plain_text import plain

logger = logging.getLogger(__name__)

Kind = Literal[
    "hello",  # refused before its first round: another code, model, data, version, or a name that is taken
    "failed",  # the client, or Flower for it, answered with an error
    "lease",  # the client's lease held too little text for one optimizer step
    "weights",  # the client no longer held the weights that it was sent the changes of
    "silent",  # no answer before the round's end
    "late",  # an answer after it
    "duplicate",  # a second answer to one message
    "foreign",  # an answer to what we did not send, of another run, or in another client's name
    "stale",  # of another round or other weights, or with another nonce
    "malformed",  # cannot be read, or has other names, shapes or dtypes
    "damaged",  # not the arrays that the report announces
    "not_finite",
    "large_norm",  # rejected for its norm
    "small_norm",  # it has moved next to nothing
    "clipped",  # merged, with its norm cut
    "tokens",  # steps, tokens or seconds that cannot be
    "position",  # rows outside of its lease
    "quorum",  # a round that too few took part in
    "evaluation",  # bits per byte could not be measured, or a client's are no such figure
    "disk",  # a checkpoint or a figure could not be written
]
KINDS: tuple[Kind, ...] = get_args(Kind)
SERVER = "server"  # stands in the place of a client where none is to blame

FILE = "events.jsonl"
MAX_FILE_BYTES = 16 << 20  # a larger file is put aside as `.old`, in the place of the one put aside before
MAX_NAMES = 1000  # clients that are counted by name; all others are counted under OTHERS
OTHERS = "others"


@dataclass
class Count:
    """How often something happened, and why, in which round and when (seconds since 1970) it happened last."""

    count: int = 0
    reason: str = ""
    round: int = 0
    when: float = 0.0


class Events:
    """Counts events by kind and client, in memory that does not grow with a run.

    Args:
        run: the folder in which `events.jsonl` gets a line an event; None for no file.
    """

    def __init__(self, run: Path | None = None) -> None:
        self._run = run
        self._counts: dict[tuple[Kind, str], Count] = defaultdict(Count)

    def add(self, kind: Kind, client: str, reason: object, round_number: int) -> None:
        """Count an event.

        Args:
            kind: The sort of what happened.
            client: name of the client, or `SERVER`.
            reason: why it happened, in words that may be a stranger's.
            round_number: the round in which it happened.
        """
        client = plain(client, 64)
        names = {name for _, name in self._counts}
        if client not in names and len(names) >= MAX_NAMES:
            client = OTHERS
        count = self._counts[kind, client]
        count.count += 1
        count.reason, count.round, count.when = plain(reason), round_number, time.time()
        if self._run is None:
            return
        figures = {"when": round(count.when, 3), "round": round_number, "client": client, "kind": kind}
        path = self._run / FILE
        try:
            if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
                path.replace(path.with_suffix(".old.jsonl"))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**figures, "reason": count.reason}) + "\n")
        except OSError as error:  # the event is counted: a full disk is no reason to end a round
            logger.warning("%s cannot be written: %s", path, error.strerror)

    def total(self, *kinds: Kind, client: str | None = None) -> int:
        """Return how many events there were, of some kinds or of all, for one client or for all."""
        return sum(
            count.count
            for (kind, name), count in self._counts.items()
            if (not kinds or kind in kinds) and (client is None or name == client)
        )

    def last(self, kind: Kind, client: str) -> Count | None:
        """Return the count of a kind and client, None if there was no such event."""
        return self._counts.get((kind, client))

    def by_client(self) -> dict[str, dict[Kind, Count]]:
        """Return the counts, by client and kind."""
        out: dict[str, dict[Kind, Count]] = defaultdict(dict)
        for (kind, client), count in sorted(self._counts.items()):
            out[client][kind] = count
        return dict(out)

    def state_dict(self) -> list[list[Any]]:
        """Return the counts as plain values."""
        return [[kind, client, asdict(count)] for (kind, client), count in self._counts.items()]

    def load_state_dict(self, state: list[list[Any]]) -> None:
        """Take up saved counts."""
        self._counts.clear()
        self._counts.update({(kind, client): Count(**count) for kind, client, count in state})
